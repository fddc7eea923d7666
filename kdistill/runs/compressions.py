"""The compressions of a run: every stage of the recipe with the teacher and, in the same budget, on labels alone."""

import dataclasses
import json
import time
from pathlib import Path

import keras

from kdistill import files, provenance
from kdistill.compression.compress import Compressed, compress
from kdistill.compression.quantized_file import QUANTIZED
from kdistill.conversion import verify
from kdistill.conversion.build import NAME, build, build_converted, remove
from kdistill.conversion.export import refused_row
from kdistill.conversion.float32 import prepare
from kdistill.data import few_labels
from kdistill.data.splits import Splits
from kdistill.errors import CheckFailed, InputError
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.networks import saving
from kdistill.recipe import SCHEMES, Distill, Profile, Schedule, Stage
from kdistill.recipe.loading import load_profile
from kdistill.recipe.objective import at_the_end
from kdistill.recipe.values import NUMBERS, as_dict
from kdistill.repairs.ladder import Retraining
from kdistill.repairs.retraining import with_teacher
from kdistill.report.markdown import refused_model
from kdistill.runs.arms import Arms
from kdistill.runs.scores import images_with_a_class
from kdistill.teachers.foreign import failures_as_messages

LABELS = "_labels"  # ends the name of a student that was fine-tuned on labels alone


def run_stages(arms: Arms, cache: str = "off") -> dict[str, dict]:
    """Compresses the student of a run by the stages of its recipe, and writes and checks their files.

    Every stage continues from the one before, once with the teacher (`pqat`) and once on labels alone (`pqat_labels`),
    beginning with the same student. Puts the models into `arms.models`; loads those that the run folder already has.
    Returns name -> `as_record` of the compression, seconds, teacher (whether it was used) and file. A compression that
    fails, and those that would continue from it, are `refused` with the reason; the next session tries them again.
    `cache`: as for `kdistill.run`.
    """
    records, students = {}, {"": arms.models["student"], LABELS: arms.models["student"]}
    failures = {}  # the first failed compression, by the end of names
    names = [stage.scheme for stage in arms.recipe.compress]
    for place, stage in enumerate(arms.recipe.compress):
        scheme = stage.scheme if names.count(stage.scheme) == 1 else f"{stage.scheme}_{place + 1}"
        for end in students:
            if end and not SCHEMES[stage.scheme] and students[end] is students[""]:
                continue  # without training, both would be the same
            name = scheme + end
            if end in failures:
                before = CheckFailed(f"It continues from '{failures[end]}', which failed.")
                records[name] = _failed(arms, name, stage, before, with_teacher=not end)
                continue
            try:
                students[end], records[name] = _run_stage(arms, name, stage, students[end], not end, cache)
                arms.models[name] = students[end]
            except CheckFailed as error:
                failures[end] = name
                records[name] = _failed(arms, name, stage, error, with_teacher=not end)
    return records


def _failed(arms: Arms, name: str, stage: Stage, error: CheckFailed, with_teacher: bool) -> dict:
    """The record of a compression that has no model."""
    arms.say(f"Refused: {name}: {error}")
    remove(arms.folder.path / name / NAME)  # of an earlier session
    empty = {"layers": [], "tables": {}, "sizes": {}, "history": {}, "notes": [str(error)]}
    refused = refused_row(f"{name}.tflite", error)
    return {"seconds": 0.0, "scheme": stage.scheme, **empty, "teacher": with_teacher, "file": None, "refused": refused}


def _run_stage(
    arms: Arms, name: str, stage: Stage, student: keras.Model, with_teacher: bool, cache: str
) -> tuple[keras.Model, dict]:
    finished = arms.folder.finished(name)
    if finished:
        arms.say(f"{name}: finished before")
        return finished
    start = time.perf_counter()
    arms.say(f"Compressing {name}: {stage.scheme}, {'with the teacher' if with_teacher else 'on labels alone'}")
    objective = {}
    if with_teacher and SCHEMES[stage.scheme]:
        objective, ended = _objective(arms.recipe.distill)
        if {output.meaning for output in (arms.splits.outputs or {}).values()} == {NUMBERS}:
            del objective["temperature"]  # does nothing there
        objective["teacher"] = arms.models["teacher"]
        objective["cache"] = arms.teaching and arms.teaching.replay_for_stage(name, stage, cache)
        if ended:
            arms.say(
                f"{name}: the terms of logits continue; those of layers ({', '.join(ended)}) end with the training"
            )
    result = compress(
        student,
        stage,
        # With the teacher the student also learns from images without a label.
        data=few_labels.for_student(arms.splits) if with_teacher else few_labels.for_control(arms.splits),
        # Images of other labels are compressed as they are.
        augment=arms.recipe.data if images_with_a_class(arms.splits) else None,
        head=arms.splits.head,
        logs=arms.folder.path / "logs" / name,
        keep=arms.folder.checkpoints(name),
        seed=arms.recipe.seed,
        say=arms.say,
        check=None,  # a refused file is a row of the report
        **objective,
    )
    about = {"recipe": as_dict(arms.recipe), "data": arms.splits.fingerprint}
    file, refused = _file_or_refusal(result, f"{name}.tflite", arms.folder.path / name, arms.splits, arms.say, about)
    if file:
        file = {"name": name, **file, "path": str(Path(file["path"]).relative_to(arms.folder.path))}
    record = {
        "seconds": time.perf_counter() - start,
        **as_record(result),
        "teacher": with_teacher,
        "file": file,
        "refused": refused,
    }
    arms.folder.finish(name, result.model, record)
    return result.model, record


def retraining(arms: Arms, profile: Profile, cache: str) -> Retraining:
    """Quantization-aware training of a run's student for the repair of its file: with the teacher and its loss.

    The stage is the first of the recipe that quantizes, if there is one. `cache`: as for `kdistill.run`.
    """
    stages = [stage for stage in arms.recipe.compress if "qat" in SCHEMES[stage.scheme]]
    own = Stage("qat", batch_size=arms.recipe.training.batch_size)
    stage, name = dataclasses.replace(stages[0], scheme="qat") if stages else own, f"repair_{profile.name}"
    objective, _ = _objective(arms.recipe.distill)
    is_normalized = bool(profile.mean or profile.std)
    if images_with_a_class(arms.splits) and arms.teaching and not is_normalized:
        objective["cache"] = arms.teaching.replay_for_stage(name, stage, cache)
    return with_teacher(
        arms.models["teacher"],
        few_labels.for_student(arms.splits),
        stage,
        profile,
        arms.say,
        augment=arms.recipe.data if images_with_a_class(arms.splits) else None,
        head=arms.splits.head,
        logs=arms.folder.path / "logs" / name,
        seed=arms.recipe.seed,
        **objective,
    )


def _objective(distill: Distill) -> tuple[dict, list[str]]:
    """The loss that the training ends with, as arguments of `compress`; and the names of the terms of layers.

    Compression wraps and splits layers, so that only terms of logits continue.
    """

    def end(value):
        return value.end if isinstance(value, Schedule) else value

    terms = {name: term for name, term in distill.terms.items() if not (term.student_tap or term.teacher_tap)}
    constant = {
        name: dataclasses.replace(term, weight=end(term.weight), options={k: end(v) for k, v in term.options.items()})
        for name, term in terms.items()
    }
    return {**at_the_end(distill), "terms": constant}, [name for name in distill.terms if name not in terms]


@failures_as_messages()
def to_folder(
    student: keras.Model, stage: Stage, teacher, splits: Splits, out: Path, *, say, mean=None, std=None, **options
) -> dict:
    """`kdistill compress`: compresses, and writes `student.tflite` (checked), `student.keras` and `compression.json`.

    Every file is written whole or not at all. The models after the finished steps are in `out`/steps, from where the
    same compression resumes after an interruption. Returns the content of `compression.json`, in which `models` has a
    row for the student before and after and for the file, measured on the test images. If the file is not good enough,
    `file` is None and `refused` states why. `mean` and `std` are those of student and teacher; the new model and its
    file take raw pixels, see `compress`.
    """
    own = {"mean": mean, "std": std}
    result = compress(student, stage, teacher, splits, keep=out / "steps", say=say, check=None, **own, **options)
    name = f"{stage.scheme}.tflite"
    file, refused = _file_or_refusal(result, name, out, splits, say)
    out.mkdir(parents=True, exist_ok=True)
    saving.save_model(result.model, out / "student.keras")
    logits = None if teacher is None else predict(teacher, splits.test.images, **own)
    models = {"before": student, stage.scheme: result.model, **({name: file["path"]} if file else {})}
    rows = [
        {"name": name, **evaluate(model, splits.test, teacher_logits=logits, **(own if model is student else {}))}
        for name, model in models.items()
    ]
    rows += [refused_model(refused)] if refused else []
    report = {**as_record(result), "file": file, "refused": refused, "models": rows, **provenance.of_run()}
    files.write_text(out / "compression.json", json.dumps(report, indent=1) + "\n")
    return report


def as_record(result: Compressed) -> dict:
    """A compression as JSON-ready values: scheme, the table by layer at the end and after every step, sizes, notes,
    history."""
    names = ("scheme", "layers", "tables", "sizes", "notes", "history")
    return {name: getattr(result, name) for name in names}


def _file_or_refusal(
    result: Compressed, name: str, folder: Path, splits: Splits, say, about: dict | None = None
) -> tuple[dict | None, dict | None]:
    """What `write_file` returns, or why the file is not written, a `refused_row`."""
    try:
        return write_file(result, folder, splits, about), None
    except (CheckFailed, InputError) as error:
        remove(folder / NAME)  # of an earlier compression, which the models beside it do not match
        say(f"Refused: {error}")
        return None, refused_row(name, error)


def write_file(result: Compressed, folder: Path, splits: Splits, about: dict | None = None) -> dict:
    """Writes the checked `.tflite` of a compression into `folder`, with its labels and `model.json`; describes it.

    A scheme that quantizes has a file of its own; the others get the float32 file of the profile `reference`. The file
    is written only if it is as good as its model on the test images and has the model's zeros and clusters: `kept` in
    the description has their counts by layer. Raises `CheckFailed`, also that of `result.refusal`, and then leaves
    `folder` unchanged.
    """
    if result.refusal:
        raise result.refusal
    student, names = prepare(result.model, splits.head), splits.class_names or None
    if result.quantized:
        built = build_converted(result.tflite(), student, QUANTIZED, names, about)
    else:
        built = build(student, load_profile("reference"), None, names, about)
    kept = result.check_file(built.content)
    logits = predict(result.model, splits.test.images) if student.classifies_images else None
    file = verify.write_checked(built, folder / NAME, student, logits, splits.test)
    return {**file, "deflated": files.byte_sizes(Path(file["path"]).read_bytes())["deflated"], "kept": kept}
