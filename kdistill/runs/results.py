"""What a run's models and files are worth. Each model predicts the test images once."""

from pathlib import Path

import numpy as np

from kdistill import provenance
from kdistill.conversion import worker
from kdistill.conversion.build import NAME, remove
from kdistill.conversion.export import export_profiles, refused_row
from kdistill.conversion.float32 import prepare
from kdistill.data import few_labels
from kdistill.data.splits import Examples, Splits
from kdistill.evaluation import diagnostics, disagreement, expectation, verdict
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.evaluation.metrics import measure
from kdistill.recipe import Profile, Recipe
from kdistill.recipe.objective import softness
from kdistill.recipe.values import as_dict
from kdistill.report.markdown import refused_model
from kdistill.runs.arms import Arms, needs_training, numbered


def measure_run(arms: Arms, profiles: list[Profile], compressions: dict) -> dict:
    """Exports the first seed's student for every profile, and measures all models and files: the run's report.

    The first seed's student, because a file picked by its test accuracy would be reported better than it is.
    `compressions` are those of `compressions.run_stages`. A file that is not good enough is not written: it is a row of
    `refused`, with its reason, and of `models`.
    """
    recipe, splits, models = arms.recipe, arms.splits, arms.models
    if any(profile.quantization == "int8" for profile in profiles):
        worker.start()  # in the background, while the models are measured
    logits = {name: arms.test_logits(name) for name in models}
    teacher = logits["teacher"]
    rows = [
        {"name": name, **measure_model(arms, name, splits.test, teacher_logits=teacher, logits=logits[name])}
        for name in models
    ]
    files, refused = _exported(arms, profiles, logits["student"])
    for name, record in compressions.items():
        written = record["file"] is not None
        (files if written else refused)[f"{name}.tflite"] = record["file"] if written else record["refused"]
    for name, file in files.items():
        rows.append({"name": name, **evaluate(arms.folder.path / file["path"], splits.test, teacher_logits=teacher)})
        file["deflated"] = rows[-1]["deflated"]
    rows += [refused_model(row) for row in refused.values()]
    temperature, validation = softness(recipe.distill), predict(models["teacher"], splits.validation.images)
    return {
        "recipe": as_dict(recipe),
        **provenance.of_run(),
        "data": {**describe_data(splits), "class_names": list(splits.class_names)},
        "strategy": arms.devices.as_dict(),
        "teachers": [file.as_dict() for file in arms.teacher_files.values()],
        "training": arms.fits,
        "compressions": compressions,
        "warnings": arms.warnings,
        "verdict": judge_seeds(arms),
        "teacher_advantage": diagnostics.teacher_advantage(
            teacher.argmax(axis=1) == splits.test.labels, *(_correct(arms, arm) for arm in ("control", "student"))
        ),
        "models": rows,
        "diagnostics": diagnostics.diagnose_models(models, splits, temperature, logits, validation),
        "differences": disagreement.write_pictures(logits["student"], teacher, splits.test, arms.folder.path),
        "files": list(files.values()),
        "refused": list(refused.values()),
    }


def measure_model(arms: Arms, name: str, examples: Examples, logits: np.ndarray, teacher_logits=None) -> dict:
    """As `evaluate`. A teacher that is no Keras model has no latency that compares, and its size is in its file."""
    file = arms.teacher_files.get(name)
    if file is None or not file.foreign:
        return evaluate(arms.models[name], examples, teacher_logits=teacher_logits, logits=logits)
    unknown = dict.fromkeys(("bytes", "deflated", "microseconds"))
    return {**measure(logits, examples.labels, teacher_logits), "parameters": file.parameters, **unknown}


def describe_data(splits: Splits) -> dict:
    """Source, fingerprint and sizes of the data, for a report."""
    return {
        "source": splits.source,
        "fingerprint": splits.fingerprint,
        **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        **few_labels.label_counts(splits),
    }


def judge_seeds(arms: Arms) -> dict:
    """The verdict, student against control, over the seeds that have been trained so far."""
    recipe, student, control = arms.recipe, _correct(arms, "student"), _correct(arms, "control")
    accuracies = [[float(correct.mean()) for correct in arm] for arm in (student, control)]
    only = None
    if arms.seeds == 1:
        only = int((student[0] & ~control[0]).sum()), int((control[0] & ~student[0]).sum())
    looks = range(recipe.seeds, recipe.max_seeds + 1) if recipe.max_seeds else ()
    return verdict.judge(*accuracies, len(arms.splits.test), only, margin=recipe.margin, looks=looks)


def compare_teacher(arms: Arms) -> dict:
    """The model that teaches the students against the control of the first seed, see `expectation.teacher_lead`."""
    for split, examples in lead_examples(arms.recipe, arms.splits).items():
        teacher, control = (
            predict(arms.models[name], examples.images).argmax(axis=1) == examples.labels
            for name in (teaching_name(arms.recipe), "control")
        )
        lead = expectation.teacher_lead(teacher, control, split)
        if lead["decidable"]:
            break
    return lead


def lead_examples(recipe: Recipe, splits: Splits) -> dict[str, Examples]:
    """The images on which teacher and control are compared, by split; the second where the first decide nothing.

    The validation images, because whoever changes settings by this comparison must not pick by the test images. But
    they may be too few (with few labels), and a teacher that comes trained may have been trained on them, as they are
    training images: then only the test images are new to it. They pick the teacher at most.
    """
    networks, classes = (recipe.teacher, *recipe.more_teachers), len(splits.class_names)
    if recipe.assistants or all(needs_training(network, classes) for network in networks):
        return {"validation": splits.validation, "test": splits.test}
    return {"test": splits.test}


def teaching_name(recipe: Recipe) -> str:
    """The name of the model that teaches the students: the last assistant, or the teacher."""
    return f"assistant_{len(recipe.assistants) - 1}" if recipe.assistants else "teacher"


def log_verdict(verdict: dict | None, folder: Path) -> None:
    """Writes the verdict to TensorBoard as text, at the step of its number of seeds, in place of an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    if verdict is None:
        return
    import tensorflow as tf

    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=verdict["seeds"]):
        tf.summary.text("verdict", f"**{verdict['headline']}**\n\n{verdict['sentence']}")
    writer.close()


def _correct(arms: Arms, arm: str) -> np.ndarray:
    """Whether the model of each seed classifies each test image correctly, bool `[seeds, n]`."""
    labels = arms.splits.test.labels
    return np.stack([arms.test_logits(numbered(arm, place)).argmax(axis=1) == labels for place in range(arms.seeds)])


def _exported(arms: Arms, profiles: list[Profile], logits: np.ndarray) -> tuple[dict[str, dict], dict[str, dict]]:
    """Profile -> its checked file, and profile -> why there is none. `logits` are the student's on the test images."""
    student, splits, folder = prepare(arms.models["student"]), arms.splits, arms.folder.path
    files, refused = export_profiles(
        student,
        folder,
        profiles,
        splits.train.images,
        splits.test,
        # A student in mixed precision computes other logits than its files, which are float32.
        model_logits=logits if student.model is arms.models["student"] else None,
        class_names=splits.class_names,
        about={"recipe": as_dict(arms.recipe), "data": splits.fingerprint},
        say=arms.say,
    )
    for name in refused:
        remove(folder / name / NAME)  # of an earlier session, with other settings
    files = {name: {**file, "path": str(Path(file["path"]).relative_to(folder))} for name, file in files.items()}
    return files, {name: refused_row(name, error) for name, error in refused.items()}
