"""Float32, nothing quantized: the file that the others are compared with.

Target: every LiteRT runtime, any batch size.
Consumed by: LiteRT's interpreter, and people who look for where accuracy is lost (`kdistill inspect --against`).
Limits: at most 0.1 points below the Keras model, 99.9 % agreement.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile("reference", max_drop=0.001, min_agreement=0.999)
