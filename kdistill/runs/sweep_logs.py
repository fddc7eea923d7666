"""A sweep in TensorBoard: the curves of every student, and its settings with its results for the HParams tab."""

import warnings
from pathlib import Path

from kdistill.report.sweep_charts import as_number

METRICS = ("accuracy", "agreement", "kl", "ece")


def tensorboard(result: dict, curves: dict, folder: Path) -> None:
    """Writes the logs of every student and seed to `folder`, in place of older ones.

    `result`: what `sweep.json` holds. `curves`: by seed and student, lists `step`, `validation` and losses by name.
    """
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own, about numpy 2
        from tensorboard.plugins.hparams import api as hparams

        for place, seed in enumerate(result["seeds"]):
            for student in result["students"]:
                path = folder / "students" / str(seed) / student["name"]
                for old in path.glob("events.out.tfevents.*"):  # of the sweep before it was resumed
                    old.unlink()
                writer = tf.summary.create_file_writer(str(path))
                with writer.as_default():
                    if student["settings"]:
                        settings = {key: _number_or_text(value) for key, value in student["settings"][0].items()}
                        hparams.hparams({**settings, "seed": seed}, trial_id=f"{student['name']},seed={seed}")
                    curve = curves[str(seed)].get(student["name"], {"step": []})
                    for key, values in curve.items():
                        for step, value in zip(curve["step"], values, strict=True):
                            if key != "step" and value is not None:
                                tf.summary.scalar(f"curve/{key}", value, step=step)
                    test, last_step = student["test"][place] or {}, (curve["step"] or [0])[-1]
                    for key in METRICS:
                        if test.get(key) is not None:
                            tf.summary.scalar(f"test/{key}", test[key], step=last_step)
                writer.close()


def _number_or_text(value: str) -> float | str:
    number = as_number(value)
    return value if number is None else number
