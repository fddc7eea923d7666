"""Reads IDX files, the format of MNIST: a header of big-endian numbers, then the bytes. Numpy only."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from kdistill.errors import InputError


def read(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not. Raises `InputError` unless it is whole and of that rank."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"'{path}' is damaged or truncated ({error}). Get the file again.") from None
    header = 4 + 4 * dimensions
    magic = struct.unpack(">I", data[:4])[0] if len(data) >= 4 else None
    expected = 0x0800 + dimensions
    if magic != expected:
        received = "nothing" if magic is None else f"0x{magic:08x}"
        raise InputError(
            f"'{path}' is no IDX file of uint8 with {dimensions} dimensions: expected the magic number "
            f"0x{expected:08x}, received {received}."
        )
    if len(data) < header:
        raise InputError(f"'{path}' is truncated: its header of {header} bytes is not whole. Get the file again.")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    size = int(np.prod(shape, dtype=object))
    if len(data) - header != size:
        raise InputError(
            f"'{path}' holds {len(data) - header} bytes where its header promises {size} (shape {shape}): "
            "it is truncated or has something appended. Get the file again."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def write(path: Path, array: np.ndarray) -> None:
    """Writes a uint8 array as an IDX file."""
    shape = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(shape + array.astype(np.uint8).tobytes())
