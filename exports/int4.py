"""Int4 weights, float input and output, by `litert-quantizer`: `pip install "kdistill[int4]"`.

Target: phones with little storage; smaller than `phone_cpu` and, on the machines we measured, slower. Any batch size.
Needs a runtime with int4 kernels: litert-quantizer keeps the version of the float file in `min_runtime`, which is too
low. The export names the layers that stay float.
Consumed by: LiteRT's interpreter and `CompiledModel`.
Limits: at most 1 points below the Keras model, 95 % agreement with it.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile("int4", quantization="int4", max_drop=0.01, min_agreement=0.95)
