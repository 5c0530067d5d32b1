"""TensorBoard's event files, read faster than TensorBoard reads them.

A file is a row of records: length (8 bytes), checksum of the length (4), an `Event` as protocol buffer, checksum of
that (4), as TensorFlow's TFRecord documentation says. The checksum of each length is compared, so that a file that was
cut off or overwritten is noticed at the record where it happened; those of the contents are not.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError

PATTERN = "events.out.tfevents.*"
_HEAD = struct.Struct("<QI")
_FOOT = 4  # bytes
_TEXT = "text"  # TensorBoard's plugin for texts
_TEXT_TAG = "/text_summary"


class EventFile(NamedTuple):
    """What an event file holds.

    Attributes:
        scalars: for each name its steps, values and times (seconds since 1970), as they were written.
        texts: for each name its steps and texts.
        problem: what of the file cannot be read, a line; empty if all of it can.
    """

    scalars: dict[str, list[tuple[int, float, float]]]
    texts: dict[str, list[tuple[int, str]]]
    problem: str


def find_event_files(folder: Path) -> list[Path]:
    """The event files of a folder in the order in which they were begun.

    Their names hold the second, the host, the process and a number that counts within the process: in the order of the
    alphabet the tenth of a second would come before the ninth.

    Args:
        folder: whose files, not those of its folders.
    """
    return sorted(folder.glob(PATTERN), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def read_event_file(path: Path) -> EventFile:
    """Read an event file as far as it can be read; one that is still being written ends in the middle of a record.

    Args:
        path: written by a `SummaryWriter`, for instance of Lightning's `TensorBoardLogger`.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    data = memoryview(path.read_bytes())
    scalars: dict[str, list[tuple[int, float, float]]] = {}
    texts: dict[str, list[tuple[int, str]]] = {}
    place = 0
    while place < len(data):
        start, end = place + _HEAD.size, 0
        if start <= len(data):
            length, checksum = _HEAD.unpack_from(data, place)
            if checksum != _length_checksum(length):
                return EventFile(scalars, texts, f"'{path}' is broken from byte {place:,} on")
            end = start + length
        if not end or end + _FOOT > len(data):
            return EventFile(scalars, texts, f"'{path}' ends in the middle of a record, after {place:,} bytes")
        try:
            event = Event.FromString(data[start:end])
        except DecodeError:
            return EventFile(scalars, texts, f"'{path}' is broken from byte {place:,} on")
        step, time = event.step, event.wall_time
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, []).append((step, value.simple_value, time))
            elif value.metadata.plugin_data.plugin_name == _TEXT:
                text = b"".join(value.tensor.string_val).decode("utf-8", "replace")
                texts.setdefault(value.tag.removesuffix(_TEXT_TAG), []).append((step, text))
        place = end + _FOOT
    return EventFile(scalars, texts, "")


@lru_cache(maxsize=4096)
def _length_checksum(length: int) -> int:
    """Masked CRC-32C of a record's length, as TFRecord has it.

    Example:
        >>> hex(_length_checksum(24))
        '0x224b7fa3'
    """
    crc = 0xFFFFFFFF
    for byte in struct.pack("<Q", length):
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
