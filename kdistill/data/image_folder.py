"""ImageNet, or a folder with a folder of JPEG or PNG files for each class -> images that stay in their files.

`train` and `val` (or `validation`, or `test`) with a folder for each class in each; or the class folders themselves, of
which a share is held out for testing. Every file's header is read, no pixel.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kdistill.data import tfds
from kdistill.data.lazy_images import Damage, EncodedImages, Files, header
from kdistill.errors import InputError
from kdistill.recipe import Data

ENDINGS = (".jpg", ".jpeg", ".png")
TESTS = ("test", "val", "validation")


def imagenet(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """ImageNet 2012 (Russakovsky et al. 2015) as class folders, or as TensorFlow Datasets has prepared it."""
    if data_dir is not None:
        return image_folder(data, data_dir, download, say)
    copy = tfds.newest("imagenet2012")
    if copy is None:
        place = tfds.root() / "downloads" / "manual"
        tars = [place / f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")]
        if not download or not all(tar.is_file() for tar in tars):
            raise InputError(
                "ImageNet cannot be downloaded by a program. Give --data-dir, a folder with train/ and val/ of one "
                f"folder of JPEGs for each class; or put {tars[0].name} and {tars[1].name} (from image-net.org) into "
                f"{place} and give --download, for TensorFlow Datasets to prepare them."
            )
        copy = tfds.prepared("imagenet2012", say)
    return tfds.tfds_images(copy, data, say)


def image_folder(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Any images, in a folder for each class."""
    if data_dir is None:
        raise InputError(f"The data set '{data.name}' expects --data-dir, a folder with a folder of images per class.")
    if not data_dir.is_dir():
        raise InputError(f"--data-dir: no folder at '{data_dir}'.")
    if (data_dir / "train").is_dir():
        folders = {"train": data_dir / "train"}
        there = [data_dir / name for name in TESTS if (data_dir / name).is_dir()]
        if not there:
            raise InputError(f"'{data_dir}' has train/, but none of {', '.join(TESTS)}. Name the folder so.")
        folders["test"] = there[0]
        for left in there[1:]:
            say(f"'{left}' is not used: the test images are those of '{there[0]}', validation is held out of train/")
    else:
        folders = {"train": data_dir}
    classes = _classes(folders["train"])
    names, labels = {}, {}
    for part, folder in folders.items():
        unknown = sorted(set(_classes(folder)) - set(classes))
        if unknown:
            raise InputError(f"'{folder}' has the class '{unknown[0]}', of which '{folders['train']}' has no folder.")
        names[part], labels[part] = _listed(data_dir, folder, classes, say)
    damage = Damage(sum(map(len, names.values())), data.max_undecodable)
    parts = {}
    for part, found in names.items():
        headers, good = _headers(data_dir, found, damage)
        images = EncodedImages(Files(data_dir, found[good], headers[good]), data.image_size, damage)
        parts[part] = images, labels[part][good]
    damage.check()
    if "test" not in parts:
        parts = _test_held_out(*parts["train"], data.validation)
    return parts, tuple(classes), f"the images in {data_dir}"


def _classes(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if len(found) < 2:
        raise InputError(
            f"'{folder}' holds {len(found)} folder(s); expected one for each class, two classes or more"
            + (f" (it has '{found[0]}' alone)." if found else ", with the images in them.")
        )
    return found


def _listed(root: Path, folder: Path, classes: list[str], say: Callable[[str], None]) -> tuple[np.ndarray, np.ndarray]:
    """The images of each class, by their paths below `root`, in the order of their names, and their labels."""
    names, labels, others, empty = [], [], [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        with os.scandir(folder / name) as entries:
            files = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        images = [file for file in files if file.lower().endswith(ENDINGS)]
        others += [f"{name}/{file}" for file in files if not file.lower().endswith(ENDINGS)]
        if not images:
            empty.append(name)
        names += [os.path.join((folder / name).relative_to(root), file) for file in images]
        labels += [label] * len(images)
    if empty and folder.name not in TESTS:
        raise InputError(f"'{folder / empty[0]}' holds no image ({', '.join(ENDINGS)}). Each class needs some.")
    if not names:
        raise InputError(f"'{folder}' holds no image ({', '.join(ENDINGS)}) in its folders of classes.")
    if others:
        say(f"'{folder}': {len(others)} files are no {', '.join(ENDINGS)} and left out, such as {others[0]}")
    return np.array([os.fsencode(name) for name in names]), np.array(labels, np.int32)


def _headers(root: Path, names: np.ndarray, damage: Damage) -> tuple[np.ndarray, np.ndarray]:
    """int64 `[n, 4]` (see `encoded.header`), and which of the images have a header that can be read, bool `[n]`."""
    headers, good = np.zeros((len(names), 4), np.int64), np.zeros(len(names), bool)

    def look(place: int) -> None:
        path = os.path.join(os.fsencode(root), names[place])
        try:
            with open(path, "rb", buffering=2048) as file:
                headers[place] = header(file, os.fstat(file.fileno()).st_size)
            good[place] = True
        except (OSError, ValueError) as error:
            damage.note(names[place], getattr(error, "strerror", None) or str(error))

    with ThreadPoolExecutor(16) as pool:  # for slow disks, which answer many at once
        for _ in pool.map(look, range(len(names))):
            pass
    return headers, good


def _test_held_out(images: EncodedImages, labels: np.ndarray, share: float):
    """A share of every class, the same whatever a run's seed, for testing; the rest for training and validation."""
    chosen = np.zeros(len(labels), bool)
    random = np.random.Generator(np.random.Philox(key=[2, 0]))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[random.permutation(members)[: max(1, round(share * len(members)))]] = True
    return {"train": (images.select(~chosen), labels[~chosen]), "test": (images.select(chosen), labels[chosen])}
