"""The story of a repair: a file that loses too much is made in other ways, until one holds its limits."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras

from kdistill.conversion import graph
from kdistill.conversion.build import NAME
from kdistill.conversion.export import input_warning
from kdistill.conversion.float32 import prepare
from kdistill.conversion.verify import as_examples
from kdistill.errors import InputError
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.repairs.candidates import Case
from kdistill.repairs.ladder import Ladder


def repair(
    student: keras.Model | str | Path,
    path: str | Path,
    profile: str | Profile = "npu",
    calibration=None,
    class_names: Sequence[str] | None = None,
    about: dict | None = None,
    *,
    examples,
    teacher=None,
    data=None,
    stage=None,
    max_bytes: int | None = None,
    keep: str | Path | None = None,
    mean=None,
    std=None,
    head: str | Mapping | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Exports a model as a `.tflite` file that holds the limits of its profile, in other ways if necessary.

    The ways are tried in this order, until a file holds its limits: as `kdistill.export` does it; recurrent layers
    unrolled; other ranges of the activations, from more calibration examples; channels of equal width; the layers that
    cost most in float; all activations in int16; quantization-aware training, with a teacher or on labels. In a file
    for hardware that computes in int8 throughout (int8 inputs or outputs, or operators of microcontrollers) no layer
    stays float.

    Args:
        student, path, profile, calibration, class_names, about, mean, std, head: as for `kdistill.export`.
        examples: on which each file is checked, once for each way; with labels for the drop of accuracy. What a way
            chooses (ranges, layers), it chooses on the calibration examples.
        teacher: as for `kdistill.compress`; None: on labels alone.
        data: training examples for quantization-aware training, as for `kdistill.compress`. None: nothing is trained.
        stage: a `Stage` with the scheme `qat`, for its epochs and learning rate. Default: `Stage("qat")`.
        max_bytes: the largest file, in bytes.
        keep: a folder for the finished steps. After an interruption, the same call resumes behind the last of them.
        say: receives a line for each attempt.

    Returns:
        The dict of `kdistill.export`, with `attempts`: a dict for each attempt, in order, with action (what was done),
        holds, skipped, reason (why it was refused or skipped), bytes, microseconds (the median time of one example on
        one thread, None where the file does not run), agreement, accuracy, drop (shares of 1) and seconds.

    Raises:
        InputError: the model cannot be exported for a reason that none of these ways changes.
        CheckFailed: nothing holds the limits; the message states what was tried, and `attempts` of the error too.

    Example:
        file = kdistill.repair(student, "files/npu", "npu", x_train, examples=(x_test, y_test), teacher=teacher,
                               data=(x_train, y_train))
        print([row["action"] for row in file["attempts"]])
    """
    path, profile = Path(path), graph.with_range(load_profile(profile), mean, std)
    path = path if path.suffix == ".tflite" else path / NAME
    if calibration is None:
        raise InputError("repair expects calibration: training examples, on which it chooses. Give 100 or more.")
    if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
        raise InputError(f"max_bytes expects a whole number of bytes, 1 or more, or None; received {max_bytes!r}.")
    for name, value in (("teacher", teacher), ("stage", stage)):
        if value is not None and data is None:
            raise InputError(f"{name} does nothing without data, the training examples. Give data, or remove {name}.")
    prepared = prepare(student, head)
    if prepared.takes_images and prepared.classifies_images:
        images, labels = as_examples(examples)
        warning = input_warning(prepared, profile, images, labels)
        if warning:
            say(f"Warning: {warning}")
    retraining = None
    if data is not None:
        from kdistill.repairs.retraining import with_teacher  # imports tf_keras, for those who train

        training = with_teacher(teacher, data, stage, profile, say)  # a wrong stage is refused before anything runs

        def retraining():
            return training

    ladder = Ladder(
        Case(prepared, profile, calibration, class_names, about), path, examples, max_bytes, retraining, keep, say
    )
    return ladder.climb()
