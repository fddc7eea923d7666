"""A quantisation-aware trained tf_keras network -> its int8 `.tflite`, with the trained ranges, looked into."""

import re
import tempfile
import warnings

import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from kdistill.errors import InputError
from kdistill.litert import quiet

_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_TYPES = {code: name for name, code in vars(schema.TensorType).items() if not name.startswith("_")}
_KERNEL_OPERATORS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")


def converted(network, output: str) -> bytes:
    """The bytes of the file: `image` float32 in, `output` float32 out, int8 between them, builtin operators only.

    No calibration images are needed: the ranges are those of the training.
    """
    spec = tf.TensorSpec([None, *network.input_shape[1:]], tf.float32, name="image")
    serve = tf.function(lambda image: {output: network(image, training=False)}, input_signature=[spec])
    module = tf.Module()
    module.held = network.variables  # not the network: tf_keras would trace every layer once more
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
                f"The quantised model cannot be converted: {str(error).strip().splitlines()[-1]}"
            ) from error


def look_inside(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """(layer -> its int8 or float weights, output channels first, layer -> operators of it that compute in float).

    Of a file made by `converted`: there quantised layers name themselves.
    """
    model = schema.ModelT.InitFromPackedBuf(content)
    weights, floats = {}, {}
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            name = _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
            output = graph.tensors[operator.outputs[0]]
            layers = _layers(output.name.decode())
            if name in _KERNEL_OPERATORS:
                kernel = graph.tensors[operator.inputs[1]]
                values = _values(model, kernel)
                layers += _layers(kernel.name.decode())
                if values is not None:
                    if name == "DEPTHWISE_CONV_2D":
                        values = np.moveaxis(values, -1, 0)
                    weights |= {layer: values for layer in layers if layer not in weights}
            if output.type == schema.TensorType.FLOAT32 and name not in ("DEQUANTIZE", "QUANTIZE"):
                for layer in layers or ["(the model)"]:
                    floats.setdefault(layer, []).append(name)
    return weights, floats


def weights_of(content: bytes) -> list[np.ndarray]:
    """The int8 or float weights of every convolution and dense layer of any `.tflite`, output channels first."""
    model = schema.ModelT.InitFromPackedBuf(content)
    found = {}
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            if _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)] in _KERNEL_OPERATORS:
                tensor = graph.tensors[operator.inputs[1]]
                found[tensor.buffer] = _values(model, tensor)
    return [values for values in found.values() if values is not None]


def _layers(name: str) -> list[str]:
    """`net/quant_conv/Relu;net/quant_norm/Fused` -> [conv, norm]: the layers of which the converter made a tensor."""
    found = re.findall(r"/quant_([^/;]+)/", name)
    return list(dict.fromkeys(found))


def _values(model, tensor) -> np.ndarray | None:
    data = model.buffers[tensor.buffer].data
    if data is None:
        return None
    kind = {"INT8": np.int8, "FLOAT32": np.float32}.get(_TYPES[tensor.type])
    return None if kind is None else np.frombuffer(bytes(data), kind).reshape(tensor.shape)
