"""ImageNet, or any folder with one folder of image files per class -> images that stay in their files.

The folder holds `train` and `test` (or `val`, or `validation`) with the class folders in both; or the class folders
themselves, and a share of their images becomes the test images. A `test` without class folders, as ImageNet is
published, has no labels: then `val` has the test images. The header of every file is read, no pixel.
"""

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kdistill.class_names import check_class_names
from kdistill.data import tfds
from kdistill.data.image_files import HEADER, header_warnings_ignored, read_header
from kdistill.data.lazy_images import Damage, EncodedImages, Files
from kdistill.errors import InputError
from kdistill.recipe import Data

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
UNREADABLE = (".heic", ".heif")  # photographs that neither TensorFlow nor Pillow can read
MOST_FILE_BYTES = 256 << 20  # of an image; 50 megapixels have 150 MB without compression
TEST_FOLDERS = ("test", "val", "validation")


def imagenet(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """ImageNet 2012 (Russakovsky et al. 2015) as class folders, or as TensorFlow Datasets has prepared it."""
    if data_dir is not None:
        return image_folder(data, data_dir, download, say)
    copy = tfds.newest_copy("imagenet2012")
    if copy is None:
        downloads = tfds.data_root() / "downloads" / "manual"
        tars = [downloads / f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")]
        if not download or not all(tar.is_file() for tar in tars):
            raise InputError(
                "ImageNet cannot be downloaded by a program. Give --data-dir, a folder with train/ and val/ that hold "
                f"one folder of JPEGs per class. Or put {tars[0].name} and {tars[1].name} (from image-net.org) into "
                f"{downloads} and give --download: TensorFlow Datasets prepares them."
            )
        copy = tfds.prepared_copy("imagenet2012", say)
    return tfds.load_encoded_images(copy, data, say)


def image_folder(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Any images, in one folder per class."""
    if data_dir is None:
        raise InputError(f"The data set '{data.name}' expects --data-dir, a folder with a folder of images per class.")
    if not data_dir.is_dir():
        raise InputError(f"--data-dir: no folder at '{data_dir}'.")
    folders = {"train": data_dir}
    if (data_dir / "train").is_dir():
        folders = {"train": data_dir / "train", "test": _test_folder(data_dir, say)}
    classes = _classes(folders["train"])
    names, labels = {}, {}
    for part, folder in folders.items():
        surplus = sorted(set(_classes(folder)) - set(classes))
        if surplus:
            raise InputError(
                f"'{folder}' has the class '{surplus[0]}', but '{folders['train']}' has no such folder. Add or remove "
                "that class."
            )
        names[part], labels[part] = _list_images(data_dir, folder, classes, say)
    damage = Damage(sum(map(len, names.values())), data.max_undecodable)
    parts = {}
    for part, paths in names.items():
        headers, readable = _read_headers(data_dir, paths, damage)
        images = EncodedImages(Files(data_dir, paths[readable], headers[readable]), data.image_size, damage)
        parts[part] = images, labels[part][readable]
    damage.check()
    if "test" not in parts:
        parts = _split_off_test(*parts["train"], data.validation)
    return parts, tuple(classes), f"the images in {data_dir}"


def _test_folder(data_dir: Path, say: Callable[[str], None]) -> Path:
    """The folder of test images beside `train`: the first that has a class of it as a folder."""
    candidates = [data_dir / name for name in TEST_FOLDERS if (data_dir / name).is_dir()]
    if not candidates:
        raise InputError(
            f"'{data_dir}' has train/, but none of {', '.join(TEST_FOLDERS)}. Rename the folder of test images."
        )
    classes = set(_folders(data_dir / "train"))
    labeled = [folder for folder in candidates if classes & set(_folders(folder))]
    chosen = (labeled or candidates)[0]
    for folder in candidates:
        if folder != chosen:
            reason = "" if folder in labeled else " (its images have no labels: it has no folder of a class)"
            say(
                f"'{folder}' is not used{reason}: test images come from '{chosen}', validation images are a share of "
                "train/"
            )
    return chosen


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _classes(folder: Path) -> list[str]:
    classes = _folders(folder)
    check_class_names(classes, f"'{folder}'", "folder")
    if len(classes) < 2:
        raise InputError(
            f"'{folder}' holds {len(classes)} folder(s); expected one folder of images per class, two classes or more"
            + (f" (it has only '{classes[0]}')." if classes else ".")
        )
    return classes


def _list_images(
    root: Path, folder: Path, classes: list[str], say: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray]:
    """The images of all classes as paths below `root`, sorted by name within a class, and their labels."""
    names, labels, skipped, empty = [], [], Counter(), {}
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        with os.scandir(folder / name) as entries:
            listed = [entry for entry in entries if not entry.name.startswith(".")]
            # A link to nothing is a damaged image, which counts as such.
            special = [e.name for e in listed if not (e.is_file() or e.is_dir()) and os.path.exists(e.path)]
            files = sorted({entry.name for entry in listed} - set(special))
        if special:  # reading a pipe waits for its writer
            skipped["that are pipes, sockets or devices"] += len(special)
        images = [file for file in files if file.lower().endswith(ENDINGS)]
        others = Counter(_ending(folder / name / file) for file in files if not file.lower().endswith(ENDINGS))
        skipped += others
        if not images:
            empty[name] = f" It has {_counts(others)}.{_advice(others)}" if others else ""
        names += [os.path.join((folder / name).relative_to(root), file) for file in images]
        labels += [label] * len(images)
    if empty and folder.name not in TEST_FOLDERS:
        name, content = next(iter(empty.items()))
        raise InputError(f"'{folder / name}' holds no image ({', '.join(ENDINGS)}).{content} Every class needs images.")
    if not names:
        content = f" They hold {_counts(skipped)}.{_advice(skipped)}" if skipped else ""
        raise InputError(f"'{folder}' holds no image ({', '.join(ENDINGS)}) in its class folders.{content}")
    if skipped:
        say(f"'{folder}': {skipped.total():,} files skipped: {_counts(skipped)}.{_advice(skipped)}")
    return np.array([os.fsencode(name) for name in names]), np.array(labels, np.int32)


def _ending(path: Path) -> str:
    return "folders" if path.is_dir() else path.suffix.lower() or "without an ending"


def _counts(endings: Counter) -> str:
    return ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common())


def _advice(endings: Counter) -> str:
    """A sentence where photographs are among the skipped files."""
    unreadable = [ending for ending in UNREADABLE if endings[ending]]
    return f" To use {' and '.join(unreadable)} files, convert them to JPEG." if unreadable else ""


def _read_headers(root: Path, names: np.ndarray, damage: Damage) -> tuple[np.ndarray, np.ndarray]:
    """The headers, int64 `[n, 5]` (see `Store`), and a mask of the images whose header can be read, bool `[n]`."""
    headers, readable = np.zeros((len(names), HEADER), np.int64), np.zeros(len(names), bool)

    def read(position: int) -> None:
        path = os.path.join(os.fsencode(root), names[position])
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size > MOST_FILE_BYTES:
                    raise ValueError(f"over {MOST_FILE_BYTES >> 20} MB")
                headers[position] = read_header(file, os.fstat(file.fileno()).st_size)
            readable[position] = True
        except (OSError, ValueError) as error:
            damage.add(names[position], getattr(error, "strerror", None) or str(error))

    # Sixteen threads, for slow disks, which read several files at a time.
    with header_warnings_ignored(), ThreadPoolExecutor(16) as pool:
        for _ in pool.map(read, range(len(names))):
            pass
    return headers, readable


def _split_off_test(images: EncodedImages, labels: np.ndarray, share: float):
    """Takes a share of every class for testing, the same for every seed of a run."""
    test_mask = np.zeros(len(labels), bool)
    random = np.random.Generator(np.random.Philox(key=[2, 0]))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        test_mask[random.permutation(members)[: max(1, round(share * len(members)))]] = True
    return {
        "train": (images.select(~test_mask), labels[~test_mask]),
        "test": (images.select(test_mask), labels[test_mask]),
    }
