"""The compressions of a run: each stage of the recipe with the teacher kept on and, in the same budget, without it."""

import dataclasses
import json
import time
from pathlib import Path

import keras

from kdistill import files, provenance
from kdistill.compression.compress import Compressed, compress
from kdistill.conversion import verify
from kdistill.conversion.export import build, converted_elsewhere
from kdistill.data import few_labels
from kdistill.data.splits import Splits
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.networks import saving
from kdistill.recipe import SCHEMES, Profile, Schedule, Stage, Term
from kdistill.recipe.objective import at_the_end
from kdistill.recipe.values import as_dict
from kdistill.runs.arms import Arms

LABELS = "_labels"  # ends the name of what was fine-tuned on labels alone
# What a quantized file may lose against its float32 model, whose weights were trained to be rounded.
QUANTIZED = Profile("compressed", quantization="int8", max_drop=0.005, min_agreement=0.98)


def run_stages(arms: Arms) -> dict[str, dict]:
    """Compresses the student of a run by the stages of its recipe, and writes and checks their files.

    Each stage goes on from the one before, once with the teacher (`pqat`) and once on labels alone (`pqat_labels`),
    from the same student. The models are among `arms.models` afterwards; what is finished in the run folder is not
    done again. Returns name -> what was done (see `told`), seconds, teacher (whether it was kept on) and file.
    """
    records, before = {}, {"": arms.models["student"], LABELS: arms.models["student"]}
    names = [stage.scheme for stage in arms.recipe.compress]
    for place, stage in enumerate(arms.recipe.compress):
        scheme = stage.scheme if names.count(stage.scheme) == 1 else f"{stage.scheme}_{place + 1}"
        for end in before:
            if end and not SCHEMES[stage.scheme] and before[end] is before[""]:
                continue  # nothing is trained: there is no other way to do it
            before[end], records[scheme + end] = _one(arms, scheme + end, stage, before[end], kept_on=not end)
            arms.models[scheme + end] = before[end]
    return records


def _one(arms: Arms, name: str, stage: Stage, student: keras.Model, kept_on: bool) -> tuple[keras.Model, dict]:
    done = arms.folder.finished(name)
    if done:
        arms.say(f"{name}: finished before")
        return done
    start = time.perf_counter()
    options = {"learning_rate": stage.learning_rate, "batch_size": stage.batch_size, "skip": stage.skip}
    options |= {"final_sparsity": stage.final_sparsity, "clusters": stage.clusters}
    options |= {"layer_sparsity": stage.layer_sparsity, "layer_clusters": stage.layer_clusters}
    if kept_on:
        options |= at_the_end(arms.recipe.distill)
        options["terms"], ended = _terms(arms.recipe.distill.terms)
        if ended:
            arms.say(
                f"{name}: the terms of layers ({', '.join(ended)}) end with the training, those of logits are kept"
            )
    # `name` says who learns: the teacher's pupils see images without a label too.
    splits = few_labels.for_student(arms.splits) if kept_on else few_labels.for_control(arms.splits)
    arms.say(f"Compressing {name}: {stage.scheme}, {'the teacher kept on' if kept_on else 'on labels alone'}")
    result = compress(
        student,
        stage.scheme,
        arms.models["teacher"] if kept_on and SCHEMES[stage.scheme] else None,
        splits,
        stage.epochs,
        augment=arms.recipe.data,
        logs=arms.folder.path / "logs" / name,
        keep=arms.folder.checkpoints(name),
        seed=arms.recipe.seed,
        say=arms.say,
        **options,
    )
    about = {"recipe": as_dict(arms.recipe), "data": arms.splits.fingerprint}
    file = write_file(result, arms.folder.path / name, arms.splits, about)
    record = {
        "seconds": time.perf_counter() - start,
        **told(result),
        "teacher": kept_on,
        "file": {"name": name, **file, "path": str(Path(file["path"]).relative_to(arms.folder.path))},
    }
    arms.folder.finish(name, result.model, record)
    return result.model, record


def to_folder(student: keras.Model, scheme: str, teacher, splits: Splits, out: Path, *, say, **options) -> dict:
    """`kdistill compress`: compresses, and writes `student.tflite` (checked), `student.keras` and `compression.json`.

    Each file is written whole or not at all. What its finished steps have made is kept in `out`/steps, from where the
    same compression goes on after an interruption. Returns what `compression.json` holds, with models: a row for the
    student before and after and for the file, measured on the test images.
    """
    result = compress(student, scheme, teacher, splits, keep=out / "steps", say=say, **options)
    file = write_file(result, out, splits)
    saving.save_model(result.model, out / "student.keras")
    logits = None if teacher is None else predict(teacher, splits.test.images)
    measured = {"before": student, scheme: result.model, f"{scheme}.tflite": file["path"]}
    rows = [{"name": name, **evaluate(each, splits.test, teacher_logits=logits)} for name, each in measured.items()]
    found = {**told(result), "file": file, "models": rows, **provenance.of_run()}
    files.write(out / "compression.json", json.dumps(found, indent=1) + "\n")
    return found


def _terms(terms: dict[str, Term]) -> tuple[dict[str, Term], list[str]]:
    """The terms of logits, with the numbers that their schedules end with; the names of the others."""

    def end(value):
        return value.end if isinstance(value, Schedule) else value

    kept = {name: term for name, term in terms.items() if not (term.student_tap or term.teacher_tap)}
    fixed = {
        name: dataclasses.replace(term, weight=end(term.weight), options={k: end(v) for k, v in term.options.items()})
        for name, term in kept.items()
    }
    return fixed, [name for name in terms if name not in kept]


def told(result: Compressed) -> dict:
    """What a compression has done, JSON-ready: scheme, the table by layer after each stage, sizes, notes, history."""
    names = ("scheme", "stages", "tables", "sizes", "notes", "history")
    return {name: getattr(result, name) for name in names}


def write_file(result: Compressed, folder: Path, splits: Splits, about: dict | None = None) -> dict:
    """The checked `.tflite` of a compression, in `folder` with its labels and `model.json`; a description of it.

    A scheme that quantizes has a file of its own; of the others it is the float32 file of the profile `reference`.
    Written only if it is as good as its model on the test images, and has the model's zeros and clusters: the dict says
    in `kept` what was counted in the file, layer by layer. Raises `CheckFailed`; `folder` stays as it was then.
    """
    if result.quantized:
        built = converted_elsewhere(result.tflite(), result.model, QUANTIZED, splits.class_names, about)
    else:
        built = build(result.model, "reference", None, splits.class_names, about)
    kept = result.check_file(built.content)
    logits = predict(result.model, splits.test.images)
    found = verify.place_checked(built, folder, result.model, logits, splits.test)
    return {**found, "deflated": files.sizes(Path(found["path"]).read_bytes())["deflated"], "kept": kept}
