"""Full int8 with int8 input and output, for NPUs, DSPs and the Edge TPU. Calibrated on training images.

Target: Android NNAPI and vendor delegates, Coral, Hexagon. The caller quantizes the input with the scale and
zero point stored in the file. One image at a time: these delegates do not support dynamic sizes.
Consumed by: NNAPI and vendors' delegates, the Edge TPU compiler, LiteRT's NPU plugins.
Limits: at most 0.2 points below the Keras model, 98 % agreement with it.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile("npu", quantization="int8", input_type="int8", output_type="int8", batch=1, min_agreement=0.98)
