"""Dynamic-range int8: int8 weights, float input and output. The default for phones without an accelerator.

Target: any phone CPU through XNNPACK, runtimes from 2.4 on (therefore dense layers are quantized per tensor).
Any batch size.
Consumed by: LiteRT's interpreter and `CompiledModel` on Android, iOS and Linux.
Limits: at most 0.2 points below the Keras model, 98 % agreement with it.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile("phone_cpu", quantization="dynamic", min_agreement=0.98)
