"""Quantization-aware training as the last way of a repair, with the teacher where there is one."""

import json
from collections.abc import Callable

import keras

from kdistill.compression.compress import compress
from kdistill.compression.inputs import check_student, checked_stage
from kdistill.conversion.float32 import weights_sha256
from kdistill.conversion.graph import keeps_range
from kdistill.errors import InputError
from kdistill.recipe import SCHEMES, Profile, Stage
from kdistill.repairs.ladder import Retraining


def with_teacher(
    teacher, data, stage: Stage | None, profile: Profile, say: Callable[[str], None], **options
) -> Retraining:
    """Training of the scheme `qat`, as `kdistill.compress` does it.

    Args:
        teacher: as for `compress`; None: on labels alone.
        data: training examples, as for `compress`.
        stage: a stage with a scheme that ends in `qat`; None: `Stage("qat")`.
        profile: the normalization of its images is that of model and teacher, too.
        say: receives lines of progress.
        options: further arguments of `compress`.
    """
    if not keeps_range(profile):
        options |= {"mean": profile.mean or None, "std": profile.std or None}
    stage = checked_stage(Stage("qat") if stage is None else stage, {})
    if "qat" not in SCHEMES[stage.scheme]:
        raise InputError(f"stage expects a scheme with quantization-aware training, such as qat; received {stage}.")

    def train(model: keras.Model) -> keras.Model:
        check_student(model, stage)
        return compress(model, stage, teacher, data, say=say, check=None, **options).model

    numbers = {name: value for name, value in options.items() if isinstance(value, (int, float, str))}
    teachers = teacher if isinstance(teacher, (list, tuple)) else [teacher]
    weights = [weights_sha256(model) if isinstance(model, keras.Model) else model is not None for model in teachers]
    return Retraining(train, json.dumps([repr(stage), weights, numbers]))
