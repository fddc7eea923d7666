"""What files claim, or inflate to, is bounded before memory is taken."""

import gzip
import io
import json
import os
import resource
import struct
import tarfile
import zipfile

import h5py
import keras
import numpy as np
import pytest

from kdistill import archives
from kdistill.data import cifar, mnist
from kdistill.errors import InputError
from kdistill.networks import saving, weights
from kdistill.tflite import metadata


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    """Small bounds, so that small files exceed them; and little memory beyond what the process has."""
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(mnist, "MOST_IDX_BYTES", 1 << 20)
    monkeypatch.setattr(cifar, "MOST_TAR_BYTES", 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB, with Keras's first model


def header(shape, kind="<f4", order="False") -> bytes:
    text = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def npz(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def test_plain_arrays_are_those_of_numpy(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3))}
    arrays |= {"text": np.array("x"), "none": np.zeros((0, 3), np.uint8), "one": np.float32(3), "b": np.array([True])}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    with archives.Arrays(tmp_path / "a.npz") as read:
        assert read.shapes == {name: np.shape(array) for name, array in arrays.items()}
        for name, array in arrays.items():
            values = read.read(name)
            assert values.dtype == np.asarray(array).dtype and np.array_equal(values, array)


@pytest.mark.parametrize(
    "member,message",
    [
        (header((784, 2**40)), "claims 3,44"),  # 3 PiB
        (header((-1, 4)) + bytes(16), "no plain array"),
        (header((4,), "|O") + bytes(32), "no plain array"),
        (header((2,), "<f4") + bytes(7), "claims 8 bytes"),
        (header((2,), "<f4") + bytes(9), "claims 8 bytes"),
        (header((2,), [("a", "<f4")]) + bytes(8), "."),
        (header((2**62, 2**62), "|u1"), "claims"),
        (header((80 << 20,), "|u1") + bytes(80 << 20), "inflate to"),
        (b"", "."),
        (b"\x93NUMPY\x09\x00" + bytes(50), "."),
    ],
)
def test_arrays_that_claim_or_inflate_to_too_much(tmp_path, member, message):
    path = npz(tmp_path / "a.npz", **{"layer/kernel": member}, **dict.fromkeys(("x_train", "y_train"), header((0,))))
    with pytest.raises(archives.ERRORS, match=message):
        archives.Arrays(path)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    with pytest.raises(InputError, match="cannot be read as plain arrays"):
        weights.load(model, [(path, None)])
    with pytest.raises(InputError, match="no readable .npz file of plain arrays"):
        mnist._read_npz(path)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2**31, 28, 28), (2**32 - 1,) * 3])
def test_a_gzipped_idx_file_that_inflates_to_too_much(tmp_path, shape):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, *shape) + bytes(50 << 20)))
    with pytest.raises(InputError, match="has more than the 1,048,576 bytes that it can need"):
        mnist.read_idx(path, 3)


def tar(path, *members, kind="w:gz"):
    with tarfile.open(path, kind, format=tarfile.GNU_FORMAT) as archive:
        for name, type_, size in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = type_, size
            archive.addfile(info, io.BytesIO(bytes(size)))
    return path


@pytest.mark.parametrize("kind", ["w:gz", "w"])
@pytest.mark.parametrize(
    "members",
    [
        [("data_batch_1.bin", tarfile.REGTYPE, 40 << 20)],
        [("notes", tarfile.REGTYPE, 40 << 20)],
        [("a", tarfile.XHDTYPE, 500_000)],
        [("a", tarfile.XGLTYPE, 500_000)],
        [("a", tarfile.GNUTYPE_LONGNAME, 500_000)],
        [("a", tarfile.GNUTYPE_SPARSE, 512)],
        [(str(i), tarfile.DIRTYPE, 0) for i in range(1500)],
    ],
)
def test_a_tar_that_inflates_to_too_much(tmp_path, members, kind):
    path = tar(tmp_path / "a.tar.gz", *members, kind=kind)
    with pytest.raises(InputError, match=r"a.tar.gz' is damaged, truncated or no tar"):
        cifar._read_tar(path)


def keras_file(tmp_path, change=None, **members):
    """A `.keras` file whose weights `change` has changed, with other members."""
    path = tmp_path / "model.keras"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="d")]).save(path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    (tmp_path / "w.h5").write_bytes(contents[saving.WEIGHTS])
    if change:
        with h5py.File(tmp_path / "w.h5", "r+") as file:
            change(file)
    contents |= {saving.WEIGHTS: (tmp_path / "w.h5").read_bytes(), **members}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def _replaced(name, **options):
    def change(file):
        del file["layers/dense/vars/0"]
        file["layers/dense/vars"].create_dataset(name, **options)

    return change


def _external_link(file):
    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = h5py.ExternalLink("/etc/passwd", "/a")


def _soft_link(file):
    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = h5py.SoftLink("/layers/dense/vars/1")


def _cycle(file):
    file["layers/dense/again"] = file["layers"]


def _virtual(file):
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "a", (2, 3))
    del file["layers/dense/vars/0"]
    file["layers/dense/vars"].create_virtual_dataset("0", layout)


@pytest.mark.parametrize(
    "change",
    [
        _replaced("0", shape=(2, 3), dtype="f4", external=[("/etc/passwd", 0, 24)]),
        _replaced("0", shape=(2**40, 2**10), dtype="f4", chunks=(1024, 1024), compression="gzip"),
        _replaced("0", shape=(9000, 9000), dtype="f4", chunks=(1024, 1024), compression="gzip"),
        _external_link,
        _soft_link,
        _cycle,
        _virtual,
    ],
)
def test_weights_of_other_places_and_sizes_are_refused(tmp_path, change):
    path = keras_file(tmp_path, change)
    with pytest.raises(InputError, match="cannot be loaded"):
        saving.load_model(path)
    os.rename(tmp_path / "w.h5", tmp_path / "own.weights.h5")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="d")])
    before = model.get_weights()
    with pytest.raises(InputError, match="cannot be read as plain arrays"):
        weights.load(model, [(tmp_path / "own.weights.h5", {"d": "d"})])
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize("member", ["config.json", "assets/more"])
def test_members_of_a_keras_file_that_inflate_to_too_much(tmp_path, member):
    assert saving.load_model(keras_file(tmp_path)).layers[0].name == "d"
    path = keras_file(tmp_path, **{member: json.dumps({}).encode() + b" " * (80 << 20)})
    with pytest.raises(InputError, match="inflate to"):
        saving.load_model(path)


def test_the_archive_behind_a_tflite_is_bounded(monkeypatch):
    def content(members):
        file = io.BytesIO(b"model")
        file.seek(0, 2)
        with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
            for name, text in members:
                archive.writestr(name, text)
        return file.getvalue()

    assert metadata._files(content([("labels.txt", "a\nb\n")])) == {"labels.txt": b"a\nb\n"}
    for members in ([("labels.txt", bytes(40 << 20))], [(str(i), b"") for i in range(99)]):
        with pytest.raises(ValueError, match="inflate to|files, of at most"):
            metadata._files(content(members))
