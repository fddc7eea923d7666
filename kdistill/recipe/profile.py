"""Whether an export profile makes sense: every value in its range, and none without an effect."""

import math

from kdistill.errors import InputError
from kdistill.recipe.values import Profile

QUANTIZATIONS = ("none", "float16", "dynamic", "int8", "int4")


def check_profile(profile: Profile) -> Profile:
    """Returns the profile if every value is in its range and has an effect. Raises `InputError` otherwise."""

    def check(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise InputError(
                f"The profile '{profile.name}': {key} expects {expected}, received {getattr(profile, key)!r}."
            )

    kind = profile.quantization
    check(kind in QUANTIZATIONS, "quantization", f"one of {', '.join(QUANTIZATIONS)}")
    inputs = ("float32", "int8", "uint8") if kind == "int8" else ("float32", "uint8")
    outputs = ("float32", "int8", "uint8") if kind == "int8" else ("float32",)
    for key, types in (("input_type", inputs), ("output_type", outputs)):
        check(getattr(profile, key) in types, key, f"{' or '.join(types)} with quantization '{kind}'")
    batch = profile.batch
    check(batch is None or (isinstance(batch, int) and batch >= 1), "batch", "None (any) or a number from 1")
    check(profile.output in (None, "logits", "probabilities"), "output", "None, 'logits' or 'probabilities'")
    check(profile.channels in (None, 1, 3), "channels", "None (as the model), 1 or 3")
    check(profile.operators in ("builtin", "micro"), "operators", "'builtin' or 'micro'")
    micro = profile.operators == "micro" and batch == 1
    check(not profile.c_array or micro, "c_array", "operators 'micro' and batch 1 with it")
    for key in ("mean", "std"):
        values = getattr(profile, key)
        numbers = isinstance(values, (tuple, list)) and all(isinstance(n, (int, float)) for n in values)
        check(numbers and all(math.isfinite(n) for n in values), key, "numbers, one or one for each channel")
    check(all(n > 0 for n in profile.std), "std", "numbers above 0")
    for key in ("max_drop", "min_agreement"):
        check(0 <= getattr(profile, key) <= 1, key, "a share from 0 to 1")
    return profile
