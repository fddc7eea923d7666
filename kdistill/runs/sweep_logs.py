"""A sweep in TensorBoard: curves, and settings with their results for the HParams tab."""

import warnings
from pathlib import Path

from kdistill.report.sweep_charts import number_of


def tensorboard(result: dict, curves: dict, folder: Path) -> None:
    """Every student's curves and, for the HParams tab, its settings with its test accuracy."""
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own, about numpy 2
        from tensorboard.plugins.hparams import api as hparams

        for place, seed in enumerate(result["seeds"]):
            for student in result["students"]:
                path = folder / "students" / str(seed) / student["name"]
                for old in path.glob("events.out.tfevents.*"):  # of a session before
                    old.unlink()
                writer = tf.summary.create_file_writer(str(path))
                with writer.as_default():
                    if student["settings"]:
                        values = {
                            key: number_of(v) if number_of(v) is not None else v
                            for key, v in student["settings"][0].items()
                        }
                        hparams.hparams({**values, "seed": seed}, trial_id=f"{student['name']},seed={seed}")
                    curve = curves[str(seed)].get(student["name"], {"step": []})
                    for key, series in curve.items():
                        for step, value in zip(curve["step"], series, strict=True):
                            if key != "step" and value is not None:
                                tf.summary.scalar(f"curve/{key}", value, step=step)
                    test, last = student["test"][place], (curve["step"] or [0])[-1]
                    if test:
                        for key in ("accuracy", "agreement", "kl", "ece"):
                            if test.get(key) is not None:
                                tf.summary.scalar(f"test/{key}", test[key], step=last)
                writer.close()
