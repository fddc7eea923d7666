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
from kdistill.evaluation.metrics import measure
from kdistill.recipe import Profile, Recipe
from kdistill.recipe.objective import softness
from kdistill.recipe.values import as_dict
from kdistill.repairs.ladder import repair_profiles
from kdistill.report.markdown import COSTS, refused_model
from kdistill.runs import head_pictures, scores
from kdistill.runs.arms import Arms, needs_training, numbered


def measure_run(arms: Arms, profiles: list[Profile], compressions: dict, cache: str = "off") -> dict:
    """Exports the first seed's student for every profile, and measures all models and files: the run's report.

    The first seed's student, because a file picked by its test accuracy would be reported better than it is.
    `compressions` are those of `compressions.run_stages`. A file that is not good enough is not written: it is a row of
    `refused`, with its reason, and of `models`. `cache`: as for `kdistill.run`, for a repair that trains.
    """
    recipe, splits, models = arms.recipe, arms.splits, arms.models
    if any(profile.quantization == "int8" for profile in profiles):
        worker.start()  # in the background, while the models are measured
    outputs = {name: arms.test_outputs(name) for name in models}
    teacher = outputs["teacher"]
    rows = _measure_models(arms, outputs)
    files, refused = _exported(arms, profiles, outputs["student"], cache)
    seen = scores.as_seen(models["student"], splits.test, splits)
    for name, record in compressions.items():
        written = record["file"] is not None
        (files if written else refused)[f"{name}.tflite"] = record["file"] if written else record["refused"]
    for name, file in files.items():
        path = arms.folder.path / file["path"]
        rows.append({"name": name, **scores.measure_file(path, seen, teacher, splits)})
        file["deflated"] = rows[-1]["deflated"]
    rows += [refused_model(row) for row in refused.values()]
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
        "models": rows,
        **_looked_into(arms, outputs),
        "files": list(files.values()),
        "refused": list(refused.values()),
    }


def _measure_models(arms: Arms, outputs: dict[str, scores.Outputs]) -> list[dict]:
    """The rows of the Keras models. The seeds share one network, whose size and time are measured once."""
    examples, first = arms.splits.test, {}
    for kind in ("control", "student"):
        first |= {numbered(kind, place): kind for place in range(1, arms.seeds)}
    rows: dict[str, dict] = {}
    for name, of_model in outputs.items():
        if name in first and arms.splits.classifies:
            costs = {key: rows[first[name]][key] for key in COSTS}
            rows[name] = {**measure(of_model, examples.labels, outputs["teacher"]), **costs}
        else:
            rows[name] = measure_model(arms, name, examples, outputs["teacher"], of_model)
    return [{"name": name, **row} for name, row in rows.items()]


def _looked_into(arms: Arms, outputs: dict[str, scores.Outputs]) -> dict:
    """What else the report shows of the test examples: by the meaning of the labels."""
    splits, teacher, student = arms.splits, outputs["teacher"], outputs["student"]
    if not splits.classifies:
        heads = [scores.named(scores.heads_in(arms.models[name], splits), splits) for name in ("student", "teacher")]
        by_output = {name: tuple(of_model[name] for of_model in heads) for name in splits.outputs}
        return {"examples": head_pictures.write(student, teacher, splits, arms.folder.path, by_output)}
    temperature = softness(arms.recipe.distill)
    validation = scores.outputs_on(arms.models["teacher"], splits.validation, splits)
    looked_into = {
        "teacher_advantage": diagnostics.teacher_advantage(
            arms.test_scores("teacher"), *(_scores(arms, arm) for arm in ("control", "student"))
        ),
        "diagnostics": diagnostics.diagnose_models(arms.models, splits, temperature, outputs, validation),
    }
    if splits.has_images:
        looked_into["differences"] = disagreement.write_pictures(student, teacher, splits.test, arms.folder.path)
    return looked_into


def measure_model(arms: Arms, name: str, examples: Examples, teacher: scores.Outputs, outputs: scores.Outputs) -> dict:
    """As `evaluate`. A teacher that is no Keras model has no latency that compares, and its size is in its file."""
    file = arms.teacher_files.get(name)
    if file is None or not file.foreign:
        return scores.measure_model(arms.models[name], examples, outputs, teacher, arms.splits)
    unknown = dict.fromkeys(("bytes", "deflated", "microseconds"))
    return {**measure(outputs, examples.labels, teacher), "parameters": file.parameters, **unknown}


def describe_data(splits: Splits) -> dict:
    """Source, fingerprint and sizes of the data, for a report."""
    return {
        "source": splits.source,
        "fingerprint": splits.fingerprint,
        **({} if splits.head is None else {"head": splits.head}),
        **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        **few_labels.label_counts(splits),
    }


def judge_seeds(arms: Arms) -> dict:
    """The verdict, student against control, over the seeds that have been trained so far."""
    recipe, student, control = arms.recipe, _scores(arms, "student"), _scores(arms, "control")
    means = [[scores.mean_score(of_seed) for of_seed in arm] for arm in (student, control)]
    options: dict = {"metric": scores.metric_of(arms.splits)}
    if arms.seeds == 1 and not arms.splits.classifies:
        options["scores"] = student[0], control[0]
    elif arms.seeds == 1:
        options["discordant"] = int((student[0] & ~control[0]).sum()), int((control[0] & ~student[0]).sum())
    looks = range(recipe.seeds, recipe.max_seeds + 1) if recipe.max_seeds else ()
    return verdict.judge(*means, len(arms.splits.test), margin=recipe.margin, looks=looks, **options)


def compare_teacher(arms: Arms) -> dict:
    """The model that teaches the students against the control of the first seed, see `expectation.teacher_lead`."""
    names = teaching_name(arms.recipe), "control"
    for split, examples in lead_examples(arms.recipe, arms.splits).items():
        models = [arms.models[name] for name in names]
        outputs = [scores.outputs_on(model, examples, arms.splits) for model in models]
        of_examples = [
            scores.scores_of(model, output, examples, arms.splits)
            for model, output in zip(models, outputs, strict=True)
        ]
        if not arms.splits.classifies:
            return expectation.lead_of_scores(*of_examples, scores.metric_of(arms.splits), split)
        lead = expectation.teacher_lead(*of_examples, split)
        if lead["decidable"]:
            break
    return lead


def lead_examples(recipe: Recipe, splits: Splits) -> dict[str, Examples]:
    """The images on which teacher and control are compared, by split; the second where the first decide nothing.

    The validation images, because whoever changes settings by this comparison must not pick by the test images. But
    they may be too few (with few labels), and a teacher that comes trained may have been trained on them, as they are
    training images: then only the test images are new to it. They pick the teacher at most.
    """
    networks = (recipe.teacher, *recipe.more_teachers)
    if recipe.assistants or all(needs_training(network, splits.sizes) for network in networks):
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


def _scores(arms: Arms, arm: str) -> np.ndarray:
    """The score of each test example under the model of each seed, `[seeds, n]`, see `scores.scores_of`."""
    return np.stack([arms.test_scores(numbered(arm, place)) for place in range(arms.seeds)])


def _exported(
    arms: Arms, profiles: list[Profile], outputs: scores.Outputs, cache: str
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Profile -> its checked file, and profile -> why there is none. `outputs`: the student's on the test examples."""
    splits, folder = arms.splits, arms.folder.path
    student = prepare(arms.models["student"], splits.head)
    options = {"class_names": splits.class_names or None}
    options["about"] = {"recipe": as_dict(arms.recipe), "data": splits.fingerprint}
    files, refused = export_profiles(
        student,
        folder,
        profiles,
        splits.train.inputs,
        splits.test,
        # A student in mixed precision computes other logits than its files, which are float32.
        model_logits=outputs if student.model is arms.models["student"] and splits.classifies else None,
        say=arms.say,
        **options,
    )
    if arms.recipe.repair and refused:
        from kdistill.runs.compressions import retraining  # imports tf_keras, for those whose files are refused

        by_name = {profile.name: profile for profile in profiles}
        files |= repair_profiles(
            student,
            folder,
            [by_name[name] for name in refused],
            splits.train.inputs,
            splits.test,
            refused,
            lambda profile: retraining(arms, profile, cache),
            say=arms.say,
            **options,
        )
        files = {name: files[name] for name in by_name if name in files}
    for name in refused:
        remove(folder / name / NAME)  # of an earlier session, with other settings
    files = {name: {**file, "path": str(Path(file["path"]).relative_to(folder))} for name, file in files.items()}
    return files, {name: refused_row(name, error) for name, error in refused.items()}
