"""Int4 weights, float input and output, made by `litert-quantizer`: `pip install "kdistill[int4]"`.

Target: phone CPUs whose room is scarce; a third smaller than `phone_cpu` and, on the machines we know, slower. Needs a
recent runtime (see `kdistill inspect`). Any batch size. What stays float is told, layer by layer.
Consumed by: LiteRT's interpreter and `CompiledModel`.
Limits: at most 1 points below the Keras model, 95 % agreement with it.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile("int4", quantization="int4", max_drop=0.01, min_agreement=0.95)
