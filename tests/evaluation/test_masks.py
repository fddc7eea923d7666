"""Metrics do not count positions that a Keras model masks, as its loss does not."""

import keras
import numpy as np
import pytest
from keras import layers
from support.headed_models import tagging

from kdistill import evaluate
from kdistill.data.arrays import Output
from kdistill.data.splits import Examples, Splits
from kdistill.evaluation.outputs import masks_of
from kdistill.runs import scores


def test_masked_positions_do_not_count():
    case = tagging()
    expected = case.inputs != 0  # 0 is padding, which the Embedding masks
    (mask,) = masks_of(case.model, {"input": case.inputs}).values()
    np.testing.assert_array_equal(mask, expected)
    predicted = case.model(case.inputs).numpy().argmax(axis=-1)
    right = (predicted == case.labels)[expected].mean()
    assert (predicted == case.labels).mean() != pytest.approx(right)
    measured = evaluate(case.model, (case.inputs, case.labels), head="classes")
    assert measured["accuracy"] == pytest.approx(right)
    # Weights count beside the mask.
    weights = np.arange(48.0)
    weighed = evaluate(case.model, (case.inputs, case.labels, weights), head="classes")["accuracy"]
    counts = weights[:, None] * expected
    assert weighed == pytest.approx(((predicted == case.labels) * counts).sum() / counts.sum())
    # In a run too: the metrics, and the score of each example.
    examples = Examples(case.inputs, case.labels)
    splits = Splits(examples, examples, examples, (), "", "", head="classes", outputs={"": Output("classes", (7, 5))})
    outputs = scores.outputs_on(case.model, examples, splits)
    row = scores.measure_model(case.model, examples, outputs, outputs, splits)
    assert row["accuracy"] == pytest.approx(right) and row["agreement"] == 1
    of_examples = scores.scores_of(case.model, outputs, examples, splits)
    first = (predicted == case.labels)[0][expected[0]].mean()
    assert of_examples[0] == pytest.approx(first)


def test_a_mask_of_labels_and_numbers_hides_them_as_missing():
    tokens = keras.Input((4,), dtype="int32")
    x = layers.Embedding(9, 3, mask_zero=True)(tokens)
    model = keras.Model(tokens, {"tags": layers.Dense(2)(x), "size": layers.Dense(1)(x)})
    inputs = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    labels = {"tags": np.zeros((2, 4, 2)), "size": np.ones((2, 4, 1), np.float32)}
    measured = evaluate(model, (inputs, labels), head={"tags": "labels", "size": "numbers"})
    outputs, seen = model(inputs), inputs != 0
    errors = (outputs["size"].numpy() - 1)[seen] ** 2
    assert measured["size"]["mse"] == pytest.approx(errors.mean(), rel=1e-5)
    assert measured["tags"]["accuracy"] == pytest.approx((outputs["tags"].numpy() <= 0)[seen].mean())


def test_models_without_masks_have_none():
    image = keras.Input((4, 4, 1))
    model = keras.Model(image, layers.Conv2D(2, 1)(image))
    assert masks_of(model, {"input": np.zeros((3, 4, 4, 1), np.float32)}) == {}
