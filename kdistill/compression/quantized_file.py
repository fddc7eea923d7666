"""A quantization-aware trained tf_keras network -> its int8 `.tflite`, with the ranges of the training."""

import tempfile
import warnings

import tensorflow as tf

from kdistill.errors import InputError
from kdistill.tflite.interpreter import quiet


def convert_quantized(network, output: str) -> bytes:
    """The bytes of the file: `image` float32 in, `output` float32 out, int8 in between, builtin operators only.

    It needs no calibration images: the ranges are those of the training. Raises `InputError` for a network that the
    converter refuses.
    """
    spec = tf.TensorSpec([None, *network.input_shape[1:]], tf.float32, name="image")
    serve = tf.function(lambda image: {output: network(image, training=False)}, input_signature=[spec])
    module = tf.Module()
    module.network_variables = network.variables  # not the network: tf_keras would trace every layer once more
    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        tf.saved_model.save(module, folder, signatures={"serving_default": serve.get_concrete_function()})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            return converter.convert()
        except Exception as error:  # the converter has no public kind of error
            raise InputError(
                f"The quantized model cannot be converted: {str(error).strip().splitlines()[-1]}"
            ) from error
