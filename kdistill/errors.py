"""The two ways in which kdistill stops: bad input (exit status 2) and a check that failed (exit status 1)."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used. The message says what, what was expected, what came, how to mend it."""


class CheckFailed(RuntimeError):
    """The input was fine, but a result is not: an export that disagrees with its model, a loss that is NaN."""


def unknown(kind: str, name: str, known: Iterable[str], mend: str = "") -> InputError:
    """The one sentence for a name that does not exist, with the nearest that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    text = f"Unknown {kind} '{name}'.{guess} Available: {', '.join(known) or 'none'}."
    return InputError(f"{text} {mend}".rstrip())
