"""The manifest of a prepared folder: what belongs to it, with a CRC-32 of each file and of the manifest itself.

Damage that keeps a file's size, such as a flipped bit, changes the CRC-32 of the file; one in the manifest changes its
own. Folders of earlier versions have no checksums; they are read with what can be seen without them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.data.rows import KINDS
from rlhf_lightning.errors import UserError

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
FORMAT = 2
"""Version of the layout; a folder of another version is not read."""
MANIFEST = "manifest.json"
PROMPT_HASHES = "prompt_hashes.npz"
"""For each file of tokens the hashes of its prompts; earlier versions did not write it."""

_CHECKSUM = "crc32"
_BLOCK = 1 << 20  # bytes
_SHAPE: dict[str, Any] = {
    "kinds": [str],
    "chat": {"fingerprint": str, "tokenizer": str},
    "arguments": {"find_turns": bool},
    "sources": {"data": {}},
    "parts": {},
    "others": {},
}
_SOURCE: dict[str, Any] = {"name": str, "source_names": [str], "source_weights": [(int, float)], "counts": dict}
_PART: dict[str, Any] = {"rows": int, "bytes": int}
_OTHER: dict[str, Any] = {"bytes": int}
_whole: set[tuple[Any, ...]] = set()
"""Files that this process has found whole, as they were then."""


def file_name(need: str, part: str) -> str:
    """The file of one part, such as `finetune_train.arrow`."""
    return f"{need}_{part}.arrow"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, readable by people too."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, said: Mapping[str, Any], others: tuple[str, ...]) -> None:
    """Write the manifest of a folder whose other files are there.

    Args:
        folder: to be completed.
        said: all but the checksums; of `parts` all but their sizes.
        others: further files of the folder.
    """
    parts = {name: {**part, **_state(folder / name)} for name, part in said["parts"].items()}
    whole = {**said, "parts": parts, "others": {name: _state(folder / name) for name in others}}
    write_json(folder / MANIFEST, {**whole, _CHECKSUM: _checksum(whole)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, after checking that it and every file it names are whole.

    Args:
        folder: a prepared folder.

    Raises:
        UserError: it is not a prepared folder, of another version, not complete, or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is not a prepared folder ({error}); make one with `rlhf prepare`") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{folder} is not a prepared folder ({MANIFEST} is no object); make one with `rlhf prepare`")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} has layout {manifest.get('format')}, this version reads {FORMAT}; run `rlhf prepare` again"
        )
    if wrong := _mistake(manifest):
        raise UserError(f"{folder} is damaged: {MANIFEST} {wrong}; run `rlhf prepare` again")
    for name, file in [*manifest["parts"].items(), *manifest.get("others", {}).items()]:
        _check_file(folder, name, file)
    return manifest


def is_checked(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has checksums, which earlier versions did not write."""
    return _CHECKSUM in manifest


def is_prepared(data: Any) -> bool:
    """Whether some data is the path of a prepared folder, complete or not."""
    if not isinstance(data, str | Path):
        return False
    try:
        said = json.loads((Path(data).expanduser() / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError, RecursionError, RuntimeError):
        # perhaps ours before it was damaged; `PreparedFolder.open` says so
        return any((Path(data).expanduser() / name).is_file() for name in _ALL_PARTS)
    return isinstance(said, dict) and {"format", "parts"} <= said.keys()  # others write files of that name too


def _mistake(manifest: Mapping[str, Any]) -> str:
    """What is wrong with what a manifest says, if anything."""
    whole = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    if manifest.get(_CHECKSUM, _checksum(whole)) != _checksum(whole):
        return "does not fit its own checksum"
    if wrong := _misshapen({"others": {}, **manifest}, _SHAPE):
        return wrong
    inner = [(f"sources.{role}", source, _SOURCE) for role, source in manifest["sources"].items()]
    inner += [(f"parts.{name}", part, _PART) for name, part in manifest["parts"].items()]
    inner += [(f"others.{name}", other, _OTHER) for name, other in manifest.get("others", {}).items()]
    if wrong := next(filter(None, (_misshapen(value, shape, path) for path, value, shape in inner)), ""):
        return wrong
    if unknown := [kind for kind in manifest["kinds"] if kind not in KINDS]:
        return f"names the kind {unknown[0]!r}, which there is not"
    named = {file_name(kind, part) for kind in manifest["kinds"] for part in PARTS}
    if named != manifest["parts"].keys():
        return f"names {', '.join(sorted(named ^ manifest['parts'].keys()))} in one of 'kinds' and 'parts' alone"
    for name, part in manifest["parts"].items():
        if _CHECKSUM not in part and _CHECKSUM in manifest:
            return f"lacks the checksum of {name}"
        if _CHECKSUM in part and _CHECKSUM not in manifest:
            return "lacks its own checksum"
    return ""


def _misshapen(value: Any, shape: Any, path: str = "") -> str:
    """Where a value read from JSON is not of a shape: a type, several, a list of one type, or a dict of shapes."""
    if isinstance(shape, list):
        right = isinstance(value, list) and all(isinstance(item, shape[0]) for item in value)
    elif isinstance(shape, dict):
        if right := isinstance(value, dict):
            for key, inner in shape.items():
                name = f"{path}.{key}".removeprefix(".")
                if wrong := f"lacks '{name}'" if key not in value else _misshapen(value[key], inner, name):
                    return wrong
    else:
        right = isinstance(value, shape)
    return "" if right else f"has {type(value).__name__} in the place of '{path}'"


def _check_file(folder: Path, name: str, file: Mapping[str, Any]) -> None:
    path = folder / Path(name).name
    try:
        state = path.stat() if path.is_file() else None
        size = state.st_size if state else 0
        if size != file["bytes"]:
            raise UserError(
                f"{folder} is not complete: {name} has {size} bytes, not {file['bytes']}; run `rlhf prepare` again"
            )
        if state is None or _CHECKSUM not in file:
            return
        at = (state.st_dev, state.st_ino, size, state.st_mtime_ns, state.st_ctime_ns, file[_CHECKSUM])
        if at not in _whole and crc32(path) != file[_CHECKSUM]:
            raise UserError(f"{folder} is damaged: {name} does not fit its checksum; run `rlhf prepare` again")
        _whole.add(at)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run `rlhf prepare` again") from error


def crc32(path: Path) -> int:
    """The CRC-32 of a file's content; about 2 GB are read in a second."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _state(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, _CHECKSUM: crc32(path)}


def _checksum(said: Mapping[str, Any]) -> int:
    """Of what a manifest says, however it is laid out."""
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


_ALL_PARTS = [file_name(kind, part) for kind in KINDS for part in PARTS]
