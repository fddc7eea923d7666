"""What a run's models and files are worth: each model is asked once for its outputs on the test images."""

from pathlib import Path

import numpy as np

from kdistill import provenance
from kdistill.conversion import float32, graph, verify
from kdistill.data import few_labels
from kdistill.evaluation import diagnostics, disagreement
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.recipe import Profile
from kdistill.recipe.objective import softness
from kdistill.recipe.values import as_dict
from kdistill.runs.arms import Arms


def measured(arms: Arms, profiles: list[Profile], compressions: dict) -> dict:
    """Exports the first seed's student for every profile and measures all models and files: the run's report.

    The first seed's, because a file that is picked by its test accuracy would be reported better than it is.
    `compressions` are those of `compressed.run_stages`. Raises `CheckFailed` for a file that is not good enough.
    """
    recipe, splits, models = arms.recipe, arms.splits, arms.models
    logits = {name: predict(model, splits.test.images) for name, model in models.items()}
    teacher = logits["teacher"]
    rows = [
        {"name": name, **evaluate(model, splits.test, teacher_logits=teacher, logits=logits[name])}
        for name, model in models.items()
    ]
    files = _exported(arms, profiles, logits["student"])
    files |= {f"{name}.tflite": made["file"] for name, made in compressions.items()}
    for name, file in files.items():
        rows.append({"name": name, **evaluate(arms.folder.path / file["path"], splits.test, teacher_logits=teacher)})
        file["deflated"] = rows[-1]["deflated"]
    temperature, validation = softness(recipe.distill), predict(models["teacher"], splits.validation.images)
    return {
        "recipe": as_dict(recipe),
        **provenance.of_run(),
        "data": {
            "source": splits.source,
            "fingerprint": splits.fingerprint,
            "class_names": list(splits.class_names),
            **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
            **few_labels.counts(splits),
        },
        "strategy": arms.devices.as_dict(),
        "training": arms.fits,
        "compressions": compressions,
        "warnings": arms.warnings,
        "verdict": arms.verdict(logits),
        "models": rows,
        "diagnostics": diagnostics.of_run(models, splits, temperature, logits, validation),
        "differences": disagreement.differing(logits["student"], teacher, splits.test, arms.folder.path),
        "files": list(files.values()),
    }


def _exported(arms: Arms, profiles: list[Profile], logits: np.ndarray) -> dict[str, dict]:
    student, splits, folder = arms.models["student"], arms.splits, arms.folder.path
    about, found = {"recipe": as_dict(arms.recipe), "data": splits.fingerprint}, {}
    for profile in profiles:
        arms.say(f"Exporting {profile.name}")
        place, names, images = folder / profile.name, splits.class_names, splits.train.images
        # What is compared with the file is the student itself, but for mixed precision and a normalization before it.
        known = logits if graph.normalized(float32.ready(student), profile) is student else None
        options = {"class_names": names, "about": about}
        file = verify.export_checked(student, place, profile, images, splits.test, known, **options)
        found[profile.name] = {**file, "path": str(Path(file["path"]).relative_to(folder))}
    return found
