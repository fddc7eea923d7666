"""Archives and arrays from elsewhere, read within bounds: what they claim is compared before memory is taken.

A file of a few megabytes can claim, or inflate to, all memory. Here every size is known and bounded before anything is
read: of the members of a zip, of the arrays in an `.npz`, of a gzipped file, of a tar, and of an HDF5 file.
"""

import gzip
import io
import math
import os
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import h5py
    import numpy as np

INFLATION = 64  # bytes from one compressed byte: images and weights reach 20 at most, zeros reach 1,000
FREE_BYTES = 256 << 20  # that any file may inflate to
MOST_MEMBERS = 100_000
PIECE = 1 << 20
ARRAY_KINDS = "biufcU"  # numbers and texts; no objects, which are pickled
# zipfile, zlib, gzip, tarfile and numpy raise these for damaged archives; a test changes random bytes of one.
ERRORS = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
)


class TooLarge(ValueError):
    """What a file claims, or inflates to, is more than a file of its size and kind can need."""


def most_inflated(compressed: int) -> int:
    """The bytes that a file of `compressed` bytes may inflate to."""
    return FREE_BYTES + INFLATION * compressed


def check_zip(archive: zipfile.ZipFile, compressed: int) -> None:
    """Raises `TooLarge` if the members of a zip of `compressed` bytes are too many, or inflate to too much."""
    members, most = archive.infolist(), most_inflated(compressed)
    total = sum(member.file_size for member in members)
    if len(members) > MOST_MEMBERS or total > most:
        raise TooLarge(
            f"its {len(members):,} members inflate to {total:,} bytes; a file of {compressed:,} bytes may have "
            f"{MOST_MEMBERS:,} members and {most:,} bytes"
        )


class Arrays:
    """The arrays of an `.npz` file: their shapes and types first, the numbers when they are read.

    Args:
        source: The path, or the content, of the file.

    Attributes:
        shapes: The shape of every array, by name, in the order of the file.
        types: The numpy type of every array, by name.

    Raises:
        TooLarge: The arrays claim more bytes than the file can hold.
        ERRORS: The file is damaged, or an array is not plain.
    """

    def __init__(self, source: str | Path | bytes):
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        self._file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, np.dtype] = {}
        self._fortran: dict[str, bool] = {}
        try:
            if self._file.read(6) == b"\x93NUMPY":
                raise ValueError("it holds one array, as an .npy file does")
            self._archive = zipfile.ZipFile(self._file)
            check_zip(self._archive, size)
            for member in self._archive.infolist():
                self._look(member)
        except BaseException:
            self._file.close()
            raise

    def _look(self, member: zipfile.ZipInfo) -> None:
        import numpy as np

        name = member.filename.removesuffix(".npy")
        if name in self.shapes or not member.filename.endswith(".npy"):
            raise ValueError(f"its member {member.filename!a} is no array, or occurs twice")
        with self._archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"the array {name!a} has the unknown version {version}")
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, kind = header(file)
            begin = file.tell()
        if kind.kind not in ARRAY_KINDS or kind.hasobject or min(shape, default=0) < 0:
            raise ValueError(f"the array {name!a} of the type {kind} is no plain array of numbers or texts")
        expected = math.prod(shape) * kind.itemsize
        if expected != member.file_size - begin:
            raise TooLarge(
                f"the array {name!a} claims {expected:,} bytes (shape {shape}), and has {member.file_size - begin:,}"
            )
        self.shapes[name], self.types[name], self._fortran[name] = tuple(map(int, shape)), kind, fortran

    def read(self, name: str) -> "np.ndarray":
        """The numbers of an array. Raises `ERRORS` for a damaged one."""
        import numpy as np

        array = np.empty(self.shapes[name], self.types[name], order="F" if self._fortran[name] else "C")
        flat = memoryview(array.reshape(-1, order="A").view(np.uint8)) if array.size else memoryview(b"")
        with self._archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
            place = 0
            while place < len(flat):
                piece = file.read(min(PIECE, len(flat) - place))
                if not piece:
                    raise EOFError(f"the array {name!a} ends after {place:,} of {len(flat):,} bytes")
                flat[place : place + len(piece)] = piece
                place += len(piece)
            if file.read(1):  # at the end, where zip compares its checksum
                raise EOFError(f"the array {name!a} is longer than its header states")
        return array

    def close(self) -> None:
        """Closes the file."""
        self._archive.close()
        self._file.close()

    def __enter__(self) -> "Arrays":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class Inflated(io.RawIOBase):
    """A file, gunzipped if it is gzipped, that ends with `TooLarge` after `most` bytes. For reading in order."""

    def __init__(self, file: BinaryIO, most: int):
        super().__init__()
        start = file.read(2)
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file
        self._left = self._most = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self._file.read(min(len(buffer), self._left + 1))
        self._left -= len(piece)
        if self._left < 0:
            raise TooLarge(f"it has more than the {self._most:,} bytes that it can need")
        buffer[: len(piece)] = piece
        return len(piece)


class _Header(tarfile.TarInfo):
    """A header of a tar whose extensions are short: tarfile reads them whole."""

    _LONGEST = 1 << 16

    def _proc_member(self, tar):
        extensions = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        extensions += (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if self.type == tarfile.GNUTYPE_SPARSE or (self.type in extensions and self.size > self._LONGEST):
            raise tarfile.ReadError("a header of it is too large, or of a sparse file")
        return super()._proc_member(tar)

    def _proc_gnusparse_00(self, *rest):
        raise tarfile.ReadError("a header of it is of a sparse file")

    _proc_gnusparse_01 = _proc_gnusparse_10 = _proc_gnusparse_00


def tar_members(path: Path, most: int, most_members: int = 1000) -> Iterator[tuple[tarfile.TarInfo, BinaryIO | None]]:
    """The headers of a tar, or tar.gz, in order, each with a reader of its content (None for what is no file).

    Read the content before the next header. At the end the checksum of gzip is compared. Raises `TooLarge` if the tar
    inflates to more than `most` bytes, or has more members; and `ERRORS`.
    """
    with open(path, "rb") as file:
        source = io.BufferedReader(Inflated(file, most), PIECE)
        with tarfile.open(fileobj=source, mode="r|", tarinfo=_Header) as tar:
            for count, member in enumerate(tar):
                if count >= most_members:
                    raise TooLarge(f"it has more than {most_members:,} members")
                yield member, tar.extractfile(member) if member.isfile() else None
                tar.members.clear()
        while source.read(PIECE):
            pass


def check_hdf5(file: "h5py.File", size: int) -> "h5py.File":
    """Returns an open HDF5 file of `size` bytes that has arrays of its own only, and no more than it can hold.

    Raises `ValueError` for a link, an array in another file, a virtual array, groups that contain each other, and
    `TooLarge` for arrays that claim too many bytes.
    """
    import h5py

    waiting, seen, total, most = [file["/"]], set(), 0, most_inflated(size)
    while waiting:
        group = waiting.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen or len(seen) > MOST_MEMBERS:
            raise ValueError(f"its group '{group.name}' is in several places, or the groups are too many")
        seen.add(address)
        for key in group:
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise ValueError(f"'{group.name}/{key}' is a link to another place")
            item = group[key]
            if isinstance(item, h5py.Group):
                waiting.append(item)
                continue
            if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
                raise ValueError(f"'{item.name}' is not an array of this file")
            total += math.prod(item.shape or ()) * item.dtype.itemsize
            if total > most:
                raise TooLarge(f"its arrays claim over {most:,} bytes; the file has {size:,}")
    return file
