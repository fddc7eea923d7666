"""What a teacher's file gives for a batch, as one float32 array: logits, and behind them the tensors that terms tap.

`server.py` loads this file by its path, in any Python from 3.8 on that has NumPy.
"""


class Refused(Exception):
    """What is wrong with the file or its outputs, in a sentence."""


def describe(error):
    """Kind and first line of an exception."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def checked(outputs, count, taps=()):
    """The outputs as float32 `[count, columns]`, and the shapes of an example's taps by name.

    With `taps` the outputs are a dict of `logits` and each tap, whose numbers follow those of the logits in this order.
    """
    import numpy as np

    if not taps:
        return _logits(outputs, count), {}
    if not isinstance(outputs, dict):
        raise Refused(
            "predict returned a {}; expected a dict of logits and {}, because terms tap these.".format(
                type(outputs).__name__, ", ".join(taps)
            )
        )
    for name in ("logits", *taps):
        if name not in outputs:
            received = ", ".join(map(str, outputs))
            raise Refused(f"predict returned a dict without '{name}'; it has {received}. Fix it, or the teacher_tap.")
    columns, shapes = [_logits(outputs["logits"], count)], {}
    for name in taps:
        numbers = _floats(outputs[name], f"tap '{name}'")
        if numbers.ndim < 2 or len(numbers) != count or not numbers[0].size:
            raise Refused(f"its tap '{name}' is {numbers.shape} for {count} images; expected [{count}, ...].")
        _check_finite(numbers.reshape(count, -1), f"in its tap '{name}' ")
        shapes[name] = list(numbers.shape[1:])
        columns.append(numbers.reshape(count, -1).astype(np.float32))
    return np.concatenate(columns, axis=1), shapes


def _logits(outputs, count):
    import numpy as np

    if isinstance(outputs, (dict, list, tuple)):
        raise Refused(f"predict returned a {type(outputs).__name__}; expected one array [n, classes].")
    numbers = _floats(outputs, "outputs", "; expected floating-point logits or probabilities [n, classes]")
    if numbers.ndim != 2 or len(numbers) != count:
        raise Refused(f"it gave outputs {numbers.shape} for {count} images; expected [{count}, classes].")
    if numbers.shape[1] < 2:
        raise Refused("it gives one number for each image; expected one for each of two classes or more.")
    _check_finite(numbers)
    return np.ascontiguousarray(numbers, np.float32)


def _floats(outputs, subject, expected="; expected floating-point numbers"):
    """An array of floating-point numbers of any framework's tensor."""
    import numpy as np

    verb = "are" if subject == "outputs" else "is"
    try:
        numbers = np.asarray(outputs)
    except Exception as error:  # such as a tensor of PyTorch that needs gradients or is on a GPU
        reason = f"its {subject} {verb} no array ({describe(error)}). Of PyTorch, return x.detach().cpu().numpy()."
        raise Refused(reason) from None
    if numbers.dtype.name == "bfloat16":
        numbers = numbers.astype(np.float32)
    if numbers.dtype.kind != "f":
        raise Refused(f"its {subject} {verb} {numbers.dtype}{expected}.")
    return numbers


def _check_finite(numbers, where=""):
    import numpy as np

    if not np.isfinite(numbers).all():
        rows = int((~np.isfinite(numbers).all(axis=1)).sum())
        raise Refused(f"it gave NaN or infinity {where}for {rows} of {len(numbers)} images.")
