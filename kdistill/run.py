"""The story of a run, top to bottom: data, teacher, control, student, files, report."""

from collections.abc import Callable
from pathlib import Path

import keras

from kdistill import data, models, provenance, report, train, verify
from kdistill.distiller import Distiller
from kdistill.evaluate import evaluate, predict
from kdistill.folder import RunFolder, new_path
from kdistill.loading import load_profile
from kdistill.recipe import Network, Recipe, Training, as_dict
from kdistill.supervised import Supervised


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    resume: bool = False,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Trains teacher, control and student, exports and checks the student, writes the report; returns it.

    `out` is a new folder, by default one under `runs/`; with `resume` it is that of a run to go on with, exactly where
    it was. `force` goes on although recipe or data differ. Raises `InputError` for what the user can mend and
    `CheckFailed` for a loss that is not finite or a file that is not good enough.
    """
    profiles = [load_profile(name) for name in recipe.exports]
    splits = data.load(recipe.data, data_dir, download, say=say)
    shape, classes = splits.train.images.shape[1:], len(splits.class_names)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.precision)
    folder = RunFolder(Path(out) if out else new_path(recipe), resume)
    try:
        folder.settle(recipe, splits.fingerprint, force, say)
        say(f"Data: {splits.source}. Run folder: {folder.path}")
        fits, trained = {}, {}

        def network(spec: Network) -> keras.Model:
            keras.utils.set_random_seed(recipe.seed)  # control and student start from the same weights
            return models.build(spec, shape, classes)

        def stage(name: str, make: Callable[[], Supervised], training: Training) -> keras.Model:
            done = folder.finished(name)
            if done:
                say(f"{name}: finished before")
                trained[name], fits[name] = done
                return trained[name]
            model = make()
            say(f"Training {name}: {model.student.count_params():,} parameters, {training.epochs} epochs")
            logs, checkpoints = folder.path / "logs" / name, folder.checkpoints(name)
            fits[name] = train.fit(model, splits, recipe.data, training, recipe.seed, logs, checkpoints, say)
            trained[name] = model.student
            folder.finish(name, model.student, fits[name])
            return model.student

        if recipe.teacher.file:
            teacher = trained["teacher"] = models.load(recipe.teacher.file, shape, classes)
        else:
            teacher = stage("teacher", lambda: Supervised(network(recipe.teacher)), recipe.teacher_training)
        stage("control", lambda: Supervised(network(recipe.student)), recipe.training)
        loss = recipe.distill
        student = stage(
            "student",
            lambda: Distiller(
                network(recipe.student),
                teacher,
                distillation_weight=loss.distillation_weight,
                temperature=loss.temperature,
            ),
            recipe.training,
        )

        teacher_logits = predict(teacher, splits.test.images)
        rows = [
            {"name": name, **evaluate(model, splits.test, teacher_logits=teacher_logits)}
            for name, model in trained.items()
        ]
        files = []
        for profile in profiles:
            say(f"Exporting {profile.name}")
            place, names = folder.path / profile.name, splits.class_names
            checked = verify.export_checked(
                student, place, profile, splits.train.images, splits.test, class_names=names
            )
            files.append({**checked, "path": str(Path(checked["path"]).relative_to(folder.path))})
            rows.append({"name": profile.name, **evaluate(checked["path"], splits.test, teacher_logits=teacher_logits)})
        result = {
            "recipe": as_dict(recipe),
            **provenance.of_run(),
            "data": {
                "source": splits.source,
                "fingerprint": splits.fingerprint,
                **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
            },
            "training": fits,
            "models": rows,
            "files": files,
        }
        report.save(result, folder.path)
        say(f"Report: {folder.path / 'report.md'}")
        return {**result, "folder": str(folder.path)}
    finally:
        folder.close()
        keras.config.set_dtype_policy(policy)
