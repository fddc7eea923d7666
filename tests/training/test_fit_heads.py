"""The fit of a run for every head: stored outputs give the student of the running teacher, and resume the same bits."""

import keras
import numpy as np
import pytest
from support.headed_models import CASES

from kdistill.data import arrays
from kdistill.data.splits import Examples, Splits
from kdistill.distillation.distiller import Distiller
from kdistill.recipe import Data, Training
from kdistill.teachers.replay import Replay
from kdistill.training import callbacks, checkpoint
from kdistill.training.fit import fit

QUIET = {"say": lambda text: None}
TRAINING = Training(epochs=2, batch_size=16, optimizer="sgd", learning_rate=0.1, schedule="constant")
DATA = Data("npz")

pytestmark = pytest.mark.slow


def splits_of(case) -> Splits:
    inputs = arrays.check_inputs(case.inputs, "case")
    labels = arrays.check_labels(case.labels, case.meaning, 48, "case")
    outputs = arrays.outputs_of([labels], case.meaning)
    data = Examples(inputs, labels)
    few = data.select(slice(16))
    return Splits(data, few, few, (), "case", "0" * 16, head=case.meaning, outputs=outputs)


def trained(name: str, splits: Splits, teacher=None, **options) -> keras.Model:
    case = CASES[name](seed=1, width=2)
    teacher = teacher or CASES[name](seed=0, width=5).model
    distiller = Distiller(case.model, distillation_weight=0.5, head=case.meaning)
    distiller.set_teacher(teacher)
    fit(distiller, splits, DATA, TRAINING, seed=3, **QUIET, **options)
    return case.model


@pytest.mark.exhaustive("binary", "depth", "multilabel", "segmentation", "tagging", "two_heads", "two_inputs")
@pytest.mark.parametrize("name", CASES)
def test_stored_outputs_and_resume(name, tmp_path, monkeypatch):
    splits = splits_of(CASES[name](seed=1))
    online = trained(name, splits)
    start = CASES[name](seed=1, width=2).model
    moved = [np.abs(a - b).max() for a, b in zip(online.get_weights(), start.get_weights(), strict=True)]
    assert max(moved) > 0.01

    teacher = CASES[name](seed=0, width=5).model
    stored = Replay(teacher, splits, DATA, TRAINING.batch_size, 3, tmp_path / "cache")
    stored.build(1, **QUIET)
    cached = trained(name, splits, lambda inputs: pytest.fail("the teacher runs"), stored=stored)
    for a, b in zip(online.get_weights(), cached.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)  # the cache holds float16

    original, steps = callbacks.StopWhenNotFinite.on_train_batch_end, []

    def interrupt(self, batch, logs=None):
        original(self, batch, logs)
        steps.append(batch)
        if len(steps) == 4:  # in the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr("kdistill.training.fit.STEPS_PER_EXECUTION", 1)
    monkeypatch.setattr(callbacks.StopWhenNotFinite, "on_train_batch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(name, splits, checkpoints=tmp_path / "checkpoints")
    monkeypatch.setattr(callbacks.StopWhenNotFinite, "on_train_batch_end", original)
    resumed = trained(name, splits, checkpoints=tmp_path / "checkpoints")
    for a, b in zip(online.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
