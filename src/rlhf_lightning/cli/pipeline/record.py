"""What is known of a step that was run: with what settings, on what, and whether it has ended."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.runs.whole_files import write_whole

if TYPE_CHECKING:
    from rlhf_lightning.cli.pipeline.steps import Pipeline, Step

_BLOCK, _SAMPLE = 1 << 20, 1 << 12
_WEIGHTS = {".safetensors", ".bin"}


class Record:
    """The record of a step, in a file beside its folder.

    Args:
        pipeline: all steps.
        step: this one.
    """

    def __init__(self, pipeline: Pipeline, step: Step) -> None:
        self._pipeline, self._step = pipeline, step
        self._path = pipeline.out / f".{step.name}.step.json"
        self._before = _read(self._path)

    def why_again(self) -> str | None:
        """Why the step is to be run; None if there is nothing to do."""
        if not self._before:
            return "to be run"
        if not self._before.get("ended"):
            return "goes on" if self.goes_on() else "begins anew, as its settings or inputs have changed"
        result = self._pipeline.result(self._step)
        if not result.exists():
            return f"'{result}' is gone"
        now, before = self._now, self._before["of"]
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return f"{changed[0]} has changed" if changed else None

    def goes_on(self) -> bool:
        """Whether a step that was begun has the settings and inputs of now."""
        if not self._before or self._before.get("ended"):
            return False
        return all(self._now.get(name) == was for name, was in self._before["of"].items())  # what is new it has made

    def begins_within(self, folders: Collection[Path]) -> bool:
        """Whether the step takes something that lies in one of these.

        Args:
            folders: of other steps.
        """
        places = [folder.resolve() for folder in folders]
        return any(path.resolve().is_relative_to(place) for path in self._inputs() for place in places)

    def begin(self) -> None:
        """Note that the step runs."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write(False, self._begun)

    def end(self) -> None:
        """Note that it has ended, on what was there when it began: it may not have seen what was changed since."""
        self._write(True, self._begun | self._read(but=self._begun))  # what is new it has made itself, such as its logs

    def _write(self, ended: bool, of: dict[str, str]) -> None:
        write_whole(self._path, json.dumps({"ended": ended, "of": of}, indent=2) + "\n")

    @property
    def _begun(self) -> dict[str, str]:
        return self._before["of"] if self.goes_on() else self._now

    @functools.cached_property
    def _now(self) -> dict[str, str]:
        """Its command, its config files, and what it reads from this disk, by name; read once, before it runs."""
        words = [word for word in self._pipeline.words(self._step) if not word.startswith("--config=")]
        found = {"its command": _hash(json.dumps(words))}
        for config in self._step.configs:
            found[f"config '{config}'"] = _hash(Path(config).read_text(encoding="utf-8"))
        return found | self._read()

    def _read(self, but: Collection[str] = ()) -> dict[str, str]:
        """Of files and folders that its settings name, but for those that are known."""
        found: dict[str, str] = {}
        for path in self._inputs():
            if f"'{path}'" not in but:
                with contextlib.suppress(OSError):
                    found[f"'{path}'"] = _hash_of(path)
        return found

    def _inputs(self) -> Iterator[Path]:
        """Files and folders that its settings name, each by itself or by a glob."""
        for text in sorted({text for text in self._pipeline.inputs(self._step) if text.strip()}):
            with contextlib.suppress(OSError, ValueError, RuntimeError, re.error):  # a text that no path can be
                path = Path(text).expanduser()
                found = sorted(map(Path, glob.iglob(str(path), recursive=True))) if glob.has_magic(text) else []
                for each in [path, *found]:
                    if (each.is_file() or each.is_dir()) and not self._is_its_place(each):
                        yield each

    def _is_its_place(self, path: Path) -> bool:
        """Whether a path lies in the step's folder, or holds it, as `.` and `/` do.

        The step itself writes there, so it would be another one after each run; and all that lies beside the runs would
        be read through each time.
        """
        own, path = self._pipeline.folder(self._step).resolve(), path.resolve()
        return path.is_relative_to(own) or own.is_relative_to(path)


def place_beside(folder: Path) -> Path:
    """Where a folder goes whose place is needed: `NAME.1`, `NAME.2` and so on."""
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    return folder.with_name(f"{folder.name}.{number}")


def _read(path: Path) -> dict[str, Any]:
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
        return said if isinstance(said, dict) and isinstance(said.get("of"), dict) else {}
    except (OSError, ValueError):
        return {}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hash_of(path: Path) -> str:
    """Of a file's content, or of all files in a folder, of large weights a part."""
    digest = hashlib.sha256()
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() if file != path else b"")
        with file.open("rb") as opened:
            size = file.stat().st_size
            if file.suffix in _WEIGHTS and size > _BLOCK:
                for start in range(0, size, _BLOCK):  # training changes every tensor: some of each block tells
                    opened.seek(start)
                    digest.update(opened.read(_SAMPLE))
                continue
            while block := opened.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:32]
