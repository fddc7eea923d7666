"""The two errors of kdistill: bad input (exit status 2) and a failed check (exit status 1)."""

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """The input cannot be used. The message states what, what was expected, what was received, and how to fix it."""


class CheckFailed(RuntimeError):
    """The input is correct, but a result is not: an export that differs from its model, a loss that is NaN."""


class FileRefused(CheckFailed):
    """A `.tflite` file is not good enough, and is not written.

    Attributes:
        reason: What is wrong.
        advice: What to try.
        check: What was measured, see `kdistill.check`; None for a file that does not run.
        size: The bytes of the file, if it was converted at all.
        attempts: What `kdistill.repair` has tried, rows of its table.
    """

    def __init__(
        self,
        reason: str,
        advice: str = "",
        check: dict | None = None,
        size: int | None = None,
        attempts: Sequence[dict] = (),
    ):
        super().__init__(f"{reason} {advice}".strip())
        self.reason, self.advice, self.check, self.size, self.attempts = reason, advice, check, size, list(attempts)


def unknown(kind: str, name: str, available: Iterable[str], advice: str = "") -> InputError:
    """The error for a name that does not exist, with the most similar available name.

    Args:
        kind: What is named, such as "data set".
        name: The name that was received.
        available: The names that exist.
        advice: A sentence on how to fix it.
    """
    available = sorted(available)
    similar = difflib.get_close_matches(name, available, n=1, cutoff=0.5)
    guess = f" Did you mean '{similar[0]}'?" if similar else ""
    text = f"Unknown {kind} '{name}'.{guess} Available: {', '.join(available) or 'none'}."
    return InputError(f"{text} {advice}".rstrip())
