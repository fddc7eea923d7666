"""From a Keras model to a `.tflite` file for one profile, in one call."""

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion.build import NAME, build, write
from kdistill.conversion.float32 import prepare
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile


def export(
    student: keras.Model | str | Path,
    path: str | Path,
    profile: str | Profile = "phone_cpu",
    calibration: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    about: dict | None = None,
) -> dict:
    """Writes a model as a `.tflite` file for a profile.

    The file is complete or absent: it is written only after it has been loaded and has run in a process of its own.
    `kdistill.conversion.verify.check` measures how well the file agrees with the model.

    Args:
        student: A Keras model, or the path of a `.keras` file: one image in, logits or probabilities `[batch, classes]`
            out.
        path: The file, ending in `.tflite`; or a folder, for `student.tflite` in it.
        profile: The name of a profile, the path of a `.py` file with one, or a `Profile`.
        calibration: Training images `[n, height, width, channels]`, raw pixels 0..255, for int8 profiles; others ignore
            them. Up to 500 are used, evenly spaced.
        class_names: The names of the classes, one line each. With them, `labels.txt` and `model.json` are written
            beside the file; both are also inside it, see `kdistill.tflite.metadata`.
        about: More for the metadata: name, description, version, author, license (texts), recipe, data (JSON values).

    Returns:
        A dict: path, profile, bytes, sha256, weights_sha256 (of the Keras model), min_runtime, input, output, outputs,
        operators, float_layers (what stayed float in a quantized file: operator, layer, reason), precision (in which
        the student computes), and with the profile's `c_array` also arena.

    Raises:
        InputError: The model, profile or images cannot be used. The message names the operator and layer at fault.

    Example:
        kdistill.export(student, "files/npu", profile="npu", calibration=x_train)
    """
    path, profile = Path(path), load_profile(profile)
    path = path if path.suffix == ".tflite" else path / NAME
    return write(build(prepare(student), profile, calibration, class_names, about), path)
