"""Float16 weights, float input and output, for the GPU delegate of a phone, which computes in float16.

Target: Android and iOS GPU delegates; a CPU runs it as float32. One image at a time: the delegates do not support
dynamic sizes.
Consumed by: the GPU delegate of LiteRT's interpreter, and `CompiledModel` with the GPU accelerator.
Limits: at most 0.1 points below the Keras model, 99.5 % agreement with it.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile("phone_gpu", quantization="float16", batch=1, max_drop=0.001, min_agreement=0.995)
