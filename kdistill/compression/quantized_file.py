"""A quantization-aware trained tf_keras network -> its int8 `.tflite`, with the ranges of the training."""

import tempfile
import warnings

import tensorflow as tf

from kdistill.conversion.convert import from_saved_model
from kdistill.conversion.tflite_converter import Job
from kdistill.recipe import Profile
from kdistill.tflite.interpreter import quiet


def convert_quantized(network, output: str) -> bytes:
    """The bytes of the file: `image` float32 in, `output` float32 out, int8 in between, builtin operators only.

    It needs no calibration images: the ranges are those of the training. Raises `InputError` for a network that the
    converter refuses, or crashes on, in a process of its own.
    """
    spec = tf.TensorSpec([None, *network.input_shape[1:]], tf.float32, name="image")
    serve = tf.function(lambda image: {output: network(image, training=False)}, input_signature=[spec])
    module = tf.Module()
    module.network_variables = network.variables  # not the network: tf_keras would trace every layer once more
    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        tf.saved_model.save(module, folder, signatures={"serving_default": serve.get_concrete_function()})
        return from_saved_model(Job(folder, "trained"), network, Profile("quantization-aware training", "int8"))
