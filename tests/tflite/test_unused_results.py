"""Results that nothing reads are outputs while a file is changed, and never after."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from kdistill.conversion import convert
from kdistill.recipe.loading import load_profile
from kdistill.tflite import flatbuffer, unused_results
from kdistill.tflite.interpreter import open_interpreter

pytestmark = pytest.mark.slow


def content_of(network) -> bytes:
    image = keras.Input((6, 6, 1))
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(network(image))))
    return convert.convert(model, load_profile("reference"))


@pytest.mark.exhaustive("<lambda>-10", "<lambda>-2")
@pytest.mark.parametrize(
    "network, unused",
    [
        (lambda image: ops.split(image, 3, axis=1)[1] + 1, 2),
        (lambda image: ops.unstack(ops.unstack(image, axis=1)[2], axis=1)[3], 10),
        (lambda image: ops.relu(image), 0),
    ],
)
def test_results_that_nothing_reads(network, unused):
    content = content_of(network)
    seen = []

    def change(given):
        model = flatbuffer.parse(given)
        (signature,) = model.signatureDefs
        seen.append((len(model.subgraphs[0].outputs), len(signature.outputs)))
        return given

    result = unused_results.with_outputs(content, change)
    assert seen == [(1 + unused, 1 + unused)]
    before, after = open_interpreter(content), open_interpreter(result)
    assert [output["name"] for output in before.get_output_details()] == [
        output["name"] for output in after.get_output_details()
    ]
    images = np.random.default_rng(0).uniform(0, 1, (1, 6, 6, 1)).astype(np.float32)
    outputs = [run.get_signature_runner()(image=images)["logits"] for run in (before, after)]
    np.testing.assert_array_equal(*outputs)
