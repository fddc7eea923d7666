"""Whether a teacher cache pays, and what it takes on the disk."""

import shutil
from collections.abc import Callable
from pathlib import Path

from kdistill.errors import InputError
from kdistill.teachers.replay import Replay

FILLING_COST = 1.1  # of a pass that fills the cache, in passes of the teacher: writing and checksums cost the 0.1


def cache_pays(
    replay: Replay,
    mode: str,
    epochs: int,
    repeat: int | None,
    fits: int = 1,
    say: Callable[[str], None] = print,
    always: bool = False,
) -> bool:
    """Whether filling the cache costs fewer passes of the teacher than `fits` trainings of `epochs` epochs.

    A mode other than `auto` is a folder that the user names: then the cache is used at any cost. Reports the reason
    through `say`. `always`: stores also where that saves no pass, so that a teacher in a process of its own is paid
    once, whatever happens to the run. Raises `InputError` if the disk of that folder has too little space.
    """
    views = replay.views(epochs, repeat)
    missing, online, needed = replay.missing(views, say), fits * epochs, replay.bytes(views)
    size = human_size(needed)
    taps = [name for name in replay.shapes if name != "logits"]
    size += f" with the layers {', '.join(taps)} of the teacher" if taps else ""
    passes = f"{fits} x {epochs} epochs run the teacher {online} times over the images, filling the cache {missing:.3g}"
    if mode == "auto" and not always and not replay.train.top_k and FILLING_COST * missing >= online:
        advice = "" if replay.by_image or repeat else "; every epoch has new images (cache.views=4 repeats those of 4)"
        say(f"Teacher cache: not used; {passes}{advice}.")
        return False
    free, new_bytes = _free_bytes(replay.root), needed * missing / views
    if new_bytes > (free / 2 if mode == "auto" else free):
        if mode == "auto":
            say(f"Teacher cache: not used. It would take {size} in {replay.root}, where {human_size(free)} are free.")
            return False
        raise InputError(
            f"The teacher cache takes {size}; in {replay.root} {human_size(free)} are free. Give --cache a folder on a "
            "larger disk, or fewer views (--set cache.views=N), "
            + ("or taps of smaller layers." if taps else "or fewer logits (--set cache.top_k=K).")
        )
    say(f"Teacher cache: used; {passes} ({views} views, {size}, in {replay.root}).")
    if views == 1 < epochs and not replay.by_image:
        say(
            "Warning: cache.views=1 shows the student the same augmented images in every epoch, so it may memorize "
            "them. Compare the validation accuracy with that of more views."
        )
    return True


def _free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def human_size(size: float) -> str:
    """Bytes with a readable unit, such as 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
