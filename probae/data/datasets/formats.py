"""Files to arrays: idx images and NumPy files, with one ValueError for a file that is not what it should be."""

import contextlib
import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from probae.arguments import printable

_UNPACKED, _RATIO = 2**28, 100  # bytes, and times its size, that an archive may unpack to; the larger of the two
_HEADER = 2**16  # bytes, more than NumPy itself reads


def idx_images(path: Path, count: int, height: int, width: int) -> np.ndarray:
    """Read gzipped idx images as rows (count, height * width) of uint8."""
    expected = f"expected {count:,} images {height}x{width} in gzipped idx format (magic 0x00000803)"
    size = 16 + count * height * width
    try:
        with gzip.open(path, "rb") as stream:
            data = stream.read(size + 1)  # and no further, whatever it unpacks to
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{printable(path)} is damaged ({error}): {expected}") from error
    header = struct.unpack(">4I", data[:16]) if len(data) >= 16 else ()
    if header != (0x803, count, height, width) or len(data) != size:
        got = f"more than {size:,}" if len(data) > size else f"{len(data):,}"
        raise ValueError(f"{printable(path)}: {expected}, got {got} bytes beginning {data[:16].hex(' ', 4)}")
    return np.frombuffer(data, np.uint8, offset=16).reshape(count, height * width).copy()


def numpy_arrays(path: Path, choose: Callable[[list[str]], list[str]]) -> list[np.ndarray]:
    """Read arrays of a ``.npz`` file, or the one of a ``.npy`` file, whose name is ``""``, never unpickling.

    Nothing is read that is not asked for, and what a header promises is held against the file's size first.

    Args:
        path: of the file.
        choose: from the names in the file to those to read.

    Raises:
        ValueError: if the file is damaged, or unpacks to far more than its size.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        packed = stream.read(2) == b"PK"
        stream.seek(0)
        if not packed:
            choose([""])
            with _damage_told(path):
                return [_array(stream, size)]
        with _damage_told(path):
            archive = zipfile.ZipFile(stream)
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        strangers = [member.filename for member in archive.infolist() if not member.filename.endswith(".npy")]
        if strangers:
            raise ValueError(f"{printable(path)}: expected NumPy arrays only, got the member {strangers[0]!r}")
        if len(members) < len(archive.infolist()):
            twice = next(name for name in members if sum(m.filename == f"{name}.npy" for m in archive.infolist()) > 1)
            raise ValueError(f"{printable(path)}: two arrays have the name {twice!r}")
        chosen = [members[name] for name in choose(list(members))]
        unpacked = sum(member.file_size for member in chosen)
        if unpacked > max(_UNPACKED, _RATIO * size):
            raise ValueError(
                f"{printable(path)}: {size:,} bytes that unpack to {unpacked:,}, more than {_RATIO} times as many: if that is "
                "meant, save the array by np.save"
            )
        with _damage_told(path):
            return [_array(archive.open(member), member.file_size) for member in chosen]


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of so many bytes, header included."""
    version = np.lib.format.read_magic(stream)
    length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
    if length > _HEADER:
        raise ValueError(f"a header of {length:,} bytes")
    stream.seek(0)
    np.lib.format.read_magic(stream)
    header: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    if version <= (2, 0):  # what is later has names that are no ASCII, and holds no plain numbers
        shape, _, dtype = header(stream)
        promised, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
        if not dtype.hasobject and (promised != there or dtype.itemsize == 0 or min(shape, default=0) < 0):
            raise ValueError(f"its header promises {dtype} {shape}, {promised:,} bytes, and {there:,} follow")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of what kind depends on the byte that was hit, and on how the archive is packed
        raise ValueError(
            f"{printable(path)} is damaged or holds objects ({printable(error) or type(error).__name__}): expected NumPy "
            "arrays of numbers, saved without pickle"
        ) from error


def archive(path: Path, expected: Mapping[str, tuple[type[np.generic], tuple[int, ...]]]) -> list[np.ndarray]:
    """Read named arrays of a ``.npz`` file, each with the type and shape it must have."""

    def told(key: str, got: str) -> ValueError:
        dtype, shape = expected[key]
        return ValueError(f"{printable(path)}: expected an array {key!r} of {dtype.__name__} {shape}, got {got}")

    def choose(names: list[str]) -> list[str]:
        for key in expected:
            if key not in names:
                raise told(key, f"only {', '.join(map(printable, sorted(names)))}")
        return list(expected)

    arrays = numpy_arrays(path, choose)
    for (key, (dtype, shape)), found in zip(expected.items(), arrays, strict=True):
        if found.shape != shape or not np.issubdtype(found.dtype, dtype):
            raise told(key, f"{found.dtype} {found.shape}")
    return [np.ascontiguousarray(array) for array in arrays]


INEXACT = (
    "whole numbers beyond 2^53 would lose digits: leave the column out if it is a label, or subtract its smallest value"
)
