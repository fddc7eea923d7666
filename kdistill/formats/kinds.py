"""The formats of a teacher's file, told by its name, and its fingerprint."""

import hashlib
from pathlib import Path

from kdistill import files
from kdistill.errors import InputError
from kdistill.tflite import metadata

ENDINGS = {
    ".keras": "Keras",
    ".h5": "HDF5",
    ".hdf5": "HDF5",
    ".tflite": "TFLite",
    ".onnx": "ONNX",
    ".py": "Python file",
    ".npz": "stored outputs",
}
OTHER_PYTHON = ("Python file", "ONNX", "SavedModel")  # formats that --teacher-python can run


def format_of(file: str | Path) -> str:
    """The format of a teacher's file, folder or address. Raises `InputError` for one that is not supported."""
    text = str(file)
    if text.startswith(("http://", "https://")):
        return "address"
    if Path(file).is_dir() and (Path(file) / "saved_model.pb").is_file():
        return "SavedModel"
    if Path(file).suffix.lower() == ".npy":
        raise InputError(
            f"'{file}' is a bare array: nothing in it tells which row belongs to which image. Store it with the images "
            "in the same order, kdistill.store_teacher(FILE, [splits.train, splits.validation, splits.test], FOLDER), "
            "and use FOLDER/teacher_logits.npz."
        )
    kind = ENDINGS.get(Path(file).suffix.lower())
    if kind is None and not Path(file).is_dir():
        raise InputError(
            f"A teacher cannot be read from '{file}': expected {', '.join(ENDINGS)}, the folder of a SavedModel, or an "
            "http:// or https:// address. Any other model runs in a Python file that defines predict(images)."
        )
    files.existing_file(file, tuple(ENDINGS))
    return kind


def file_fingerprint(file: str | Path) -> str:
    """The first 16 digits of the SHA-256 of a file, of all files of a folder, or of an address."""
    if format_of(file) == "address":
        return hashlib.sha256(str(file).encode()).hexdigest()[:16]
    path = Path(file)
    if path.is_dir():
        digest = hashlib.sha256()
        for part in sorted(part for part in path.rglob("*") if part.is_file()):
            digest.update(f"{part.relative_to(path)} {files.sha256(part)}\n".encode())
        return digest.hexdigest()[:16]
    return files.sha256(path)[:16]


def check_process_settings(file: str | Path, python: str | None, timeout: float | None) -> None:
    """Raises `InputError` for an interpreter or a time limit that would do nothing."""
    kind = format_of(file)
    if timeout is not None and kind in ("Keras", "stored outputs"):
        raise InputError(
            f"--teacher-timeout does nothing for '{file}' ({kind}), which no other process runs. Leave it out."
        )
    if python is not None and kind not in OTHER_PYTHON:
        raise InputError(
            f"--teacher-python does nothing for '{file}' ({kind}); it is for {', '.join(OTHER_PYTHON)}. Leave it out."
        )


def tflite_normalization(path: str | Path) -> dict:
    """`mean` and `std` that the metadata of a float `.tflite` state: its input is (pixel - mean) / std.

    Empty where they state none, and for a file of kdistill, which takes raw pixels.
    """
    values = metadata.of_file(path) or {}
    first, document = (values.get("inputs") or [{}])[0], values.get("document")
    mean, std = ([float(number) for number in first.get(name) or ()] for name in ("mean", "std"))
    if isinstance(document, dict) or not mean or len(mean) != len(std) or not min(std) > 0:
        return {}
    return {"mean": mean, "std": std}
