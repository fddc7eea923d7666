"""Float32 without quantization: the other files are compared with this one.

Target: every LiteRT runtime, any batch size.
Consumed by: LiteRT's interpreter, and `kdistill inspect --against`, which shows where accuracy is lost.
Limits: at most 0.1 points below the Keras model, 99.9 % agreement.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile("reference", max_drop=0.001, min_agreement=0.999)
