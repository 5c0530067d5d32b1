"""Files as bytes, plain or gzipped, and what a file turns out to be by its beginning."""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlhf_lightning.errors import UserError

BOM = b"\xef\xbb\xbf"
"""The mark that some programs write at the beginning of UTF-8."""
GZIP_ERRORS = (gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a gzip file raises that breaks off, or is not one."""

_HTML = re.compile(rb"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)


def looks_like_html(head: bytes) -> bool:
    """Whether a file that begins so is a web page, such as the page of an error or a login, saved by mistake."""
    return _HTML.match(head) is not None


def without_bom(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Lines, the first without the mark that some programs write at the beginning of UTF-8."""
    for line in lines:
        yield line.removeprefix(BOM)
        break
    yield from lines


def open_binary(path: Path, packed: bool) -> BinaryIO:
    """A file to be read once from its beginning, unpacked on the way if it is gzipped."""
    return cast("BinaryIO", gzip.open(path)) if packed else path.open("rb")


def checked_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file, with one clear line for a gzip file that breaks off."""
    try:
        yield from file
    except GZIP_ERRORS as error:
        raise gzip_error(path, error) from error


def open_seekable(path: Path, packed: bool, scratch: Path) -> BinaryIO:
    """A file to be read anywhere.

    Args:
        path: the file.
        packed: whether it is gzipped and to be unpacked.
        scratch: folder for the unpacked form, made if missing; the file has no name there and goes with the process.

    Raises:
        UserError: broken gzip, or a folder that cannot be written.
    """
    if not packed:
        return path.open("rb")
    unpacked = scratch_file(scratch, buffering=0)
    try:
        with gzip.open(path) as file:
            shutil.copyfileobj(file, unpacked, 1 << 20)
    except GZIP_ERRORS as error:
        raise gzip_error(path, error) from error
    unpacked.seek(0)
    return io.BufferedReader(unpacked)


def scratch_file(folder: Path, buffering: int = -1) -> Any:
    """A temporary file to unpack into; UserError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder, buffering=buffering)
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be written ({error.strerror}), and data are unpacked there; set another in "
            "$RLHF_LIGHTNING_CACHE"
        ) from error


def gzip_error(path: Path, error: Exception) -> UserError:
    """What to say of a gzip file that breaks off, or is not one."""
    return UserError(f"{path} is not a complete gzip file: {error}; fetch it again")


def packed_twice(head: bytes) -> str:
    """What is wrong with a text file that begins so, if it is not one: compressed once more, or in UTF-16."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16 text; save it as UTF-8"
    kinds = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
    found = next((kind for magic, kind in kinds.items() if head.startswith(magic)), None)
    return f"is compressed by {found}, which its name does not say; unpack it" if found else ""


def head_of(path: Path, packed: bool) -> bytes:
    """The beginning of a file, unpacked, without white space and marks before it; empty if there is nothing else."""
    with open_binary(path, packed) as file:
        try:
            return file.read(1 << 16).removeprefix(BOM).lstrip()[:1024]
        except GZIP_ERRORS as error:
            raise gzip_error(path, error) from error
