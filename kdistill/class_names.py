"""Which class names can be labels: they become lines of `labels.txt`, titles of pictures and cells of tables."""

import unicodedata
from collections.abc import Sequence

from kdistill.errors import InputError

LONGEST = 200  # characters
# Control characters, line and paragraph separators, and bytes of a file name that are no UTF-8.
_REFUSED_CATEGORIES = {"Cc", "Zl", "Zp", "Cs"}


def check_class_names(names: Sequence[str], source: str, kind: str = "class") -> None:
    """Checks every class name, so that no name is refused when a trained model is exported.

    Args:
        names: The class names in the order of their labels.
        source: Where they come from, for the message.
        kind: What carries the name, for the message, such as "folder".

    Raises:
        InputError: A name is empty, is longer than 200 characters, or holds a control character.
    """
    for name in names:
        reason = _reason(name)
        if reason:
            shown = ascii(name if len(name) <= LONGEST else name[:40] + "...")
            raise InputError(
                f"{source}: the {kind} {shown} cannot be a class name: it {reason}. Expected 1 to {LONGEST} printable "
                f"characters on one line. Rename the {kind}."
            )


def _reason(name: str) -> str | None:
    if not name.strip():
        return "is empty"
    if len(name) > LONGEST:
        return f"has {len(name)} characters"
    if any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in name):
        return "holds a line break, another control character, or bytes that are no UTF-8"
    return None
