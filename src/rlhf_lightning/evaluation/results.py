"""What an evaluation finds: numbers with intervals and curves in `evaluation.json`, rows in `evaluation.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_lightning import __version__
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.secrets import without_secrets
from rlhf_lightning.runs.whole_files import write_whole

VERSION = 1
"""Of the layout of `evaluation.json`."""
RESULTS, LINES = "evaluation.json", "evaluation.jsonl"
Point = tuple[float | None, float | None, float | None, float | None, int | None]


class Result(NamedTuple):
    """One number.

    Attributes:
        metric: what was measured; `docs/evaluation.md` says what each means.
        model: whose it is, as the user named it.
        group: of which rows, such as `all` or `source=helpful`, or against what.
        value: the number.
        low: where its 95% interval begins; None where there is none.
        high: where that ends.
        count: rows it was measured on.
    """

    metric: str
    model: str
    group: str
    value: float
    low: float | None
    high: float | None
    count: int  # type: ignore[assignment]  # not what tuples call so


class Curve(NamedTuple):
    """Several points that belong together.

    Attributes:
        metric: what was measured.
        model: whose it is.
        x: what goes to the right.
        y: what goes up.
        points: x, y, the 95% interval of y, and the rows behind it; None for what is not known.
        fits: numbers of what was fitted to them, by name.
    """

    metric: str
    model: str
    x: str
    y: str
    points: list[Point]
    fits: dict[str, Any] = {}  # noqa: RUF012, never changed


@dataclass
class Evaluation:
    """All that an evaluation found.

    Args:
        settings: what it was made with.
        results: in the order of the tasks.
        curves: the same.
        made: when, in ISO format.
        rlhf_lightning: version of the package.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    made: str = field(default_factory=lambda: datetime.now().isoformat(timespec="seconds"))
    rlhf_lightning: str = __version__

    def save(self, folder: str | Path) -> Path:
        """Write `evaluation.json` in one step, so that it is never half there.

        Args:
            folder: made where it is missing.

        Raises:
            UserError: a file of that name lies there that no evaluation wrote.
        """
        _check_ours(Path(folder) / RESULTS)
        said = {"version": VERSION, "made": self.made, "rlhf_lightning": self.rlhf_lightning, "settings": self.settings}
        results = [finite(result._asdict()) for result in self.results]
        curves = [finite(curve._asdict()) for curve in self.curves]
        path = Path(folder) / RESULTS
        text = json.dumps({**said, "results": results, "curves": curves}, indent=1, ensure_ascii=False, allow_nan=False)
        _write(path, without_secrets(text) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """Read `evaluation.json`.

        Args:
            path: the file, or the folder that it lies in.

        Raises:
            UserError: there is none, or it is of another version.
        """
        file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            if said["version"] != VERSION:
                raise UserError(f"{file} has version {said['version']}, this package reads {VERSION}; evaluate again")
            results = [Result(**result) for result in said["results"]]
            curves = [Curve(**{**c, "points": [tuple(p) for p in c["points"]]}) for c in said["curves"]]
            return cls(said["settings"], results, curves, said["made"], said["rlhf_lightning"])
        except FileNotFoundError as error:
            raise UserError(f"{file} does not exist; make it with `rlhf evaluate`") from error
        except UserError:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is not what `rlhf evaluate` writes ({error!r}); evaluate again") from error

    def print_table(self, console: Console) -> None:
        """Show every number with its interval.

        Args:
            console: where.
        """
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("metric", no_wrap=True)
        for name in ("model", "group"):
            table.add_column(name, overflow="fold")
        for name in ("value", "95% interval", "rows"):
            table.add_column(name, justify="right", no_wrap=True)
        before: tuple[str, str] = ("", "")
        for result in self.results:
            own = (result.metric, result.model)
            shown = ["" if mine == last else mine for mine, last in zip(own, before, strict=True)]
            shown[1] = own[1] if shown[0] else shown[1]
            interval = (
                "" if result.low is None or result.high is None else f"{_said(result.low)} to {_said(result.high)}"
            )
            # As texts, for what users name may look like markup.
            table.add_row(*map(Text, (*shown, result.group, _said(result.value), interval, f"{result.count:,}")))
            before = own
        console.print(table)


def _said(number: float) -> str:
    """A number for people."""
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.2g}" if 0 < abs(number) < 0.01 else f"{number:.3f}"


class Lines:
    """The lines of `evaluation.jsonl`: one for each metric, model and row, kept while an evaluation goes on.

    A line bears the key of the settings and of the row it was made with. One that was made with the same is not made
    again, so an evaluation that was stopped goes on where it was.

    Args:
        folder: made where it is missing.
        name: of the file.
        writer: the command that writes it, for messages.

    Attributes:
        contents: a hash of what each row says, by its number; rows of other data have the same numbers.
    """

    def __init__(self, folder: str | Path, name: str = LINES, writer: str = "rlhf evaluate") -> None:
        self.path = Path(folder) / name
        self.contents: dict[int, str] = {}
        self._made: dict[tuple[str, str, int], dict[str, Any]] = {}
        before = self.path.read_bytes() if self.path.is_file() else b""
        self._before = {_place(line): line for line in _lines_of(before)}
        if before.count(b"\n") > 1 and not self._before:
            raise _foreign(self.path, writer)
        self._gap = "" if before.endswith(b"\n") or not before else "\n"  # behind a line that was cut off
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path.parent} cannot be made ({error.strerror}); name another folder") from error

    def before(self, metric: str) -> list[dict[str, Any]]:
        """Lines of a metric that the file held when it was opened, whatever their key.

        Args:
            metric: which.
        """
        return [line for place, line in self._before.items() if place[0] == metric]

    def made_before(self, metric: str, model: str, key: str) -> dict[int, dict[str, Any]]:
        """Lines that need not be made again, by their row.

        Args:
            metric: which.
            model: whose.
            key: of the settings, see `key_of_settings`.
        """
        found = {}
        for place, line in self._before.items():
            if place[:2] == (metric, model) and line.get("key") == self._key(key, place[2]):
                self._made[place] = found[place[2]] = line
        return found

    def add(self, lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Write lines behind the others at once; returns them as `made_before` will.

        Args:
            lines: each with `metric`, `model`, `row` and `key`.
        """
        new = [finite({**line, "key": self._key(line["key"], line["row"])}) for line in lines]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._gap + "".join(_written(line) for line in new))
        self._gap = ""
        self._made.update({_place(line): line for line in new})
        return new

    def _key(self, key: str, row: int) -> str:
        return "-".join(filter(None, (key, self.contents.get(row))))

    def finish(self) -> None:
        """Leave only the lines of this evaluation, in order: by task and model as they came, then by row."""
        order = {place[:2]: number for number, place in enumerate(dict.fromkeys(p[:2] for p in self._made))}
        places = sorted(self._made, key=lambda place: (order[place[:2]], place[2]))
        _write(self.path, "".join(_written(self._made[place]) for place in places))


def _check_ours(path: Path) -> None:
    if not path.exists():
        return
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or "rlhf_lightning" not in said:
        raise _foreign(path)


def _foreign(path: Path, writer: str = "rlhf evaluate") -> UserError:
    return UserError(f"{path} is not what `{writer}` writes; name another folder, or move it away")


def key_of_settings(*said: Any) -> str:
    """A short hash of everything that decides what a line says.

    Args:
        *said: anything that JSON, or `repr`, can say.

    Example:
        >>> key_of_settings("perplexity", {"seed": 1}) == key_of_settings("perplexity", {"seed": 1})
        True
    """
    return blake2b(json.dumps(said, sort_keys=True, default=repr).encode(), digest_size=6).hexdigest()


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another folder") from error


def finite(value: Any) -> Any:
    """A value as JSON may hold it: null for numbers that are infinite or none."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    return value


def _place(line: Mapping[str, Any]) -> tuple[str, str, int]:
    return line["metric"], line["model"], line["row"]


def _written(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _lines_of(text: bytes) -> list[dict[str, Any]]:
    """Lines of a file, without one that was cut off where a run was killed."""
    found = []
    for one in text.split(b"\n"):
        try:
            line = json.loads(one)
            _place(line)
        except (ValueError, KeyError, TypeError):
            continue
        found.append(line)
    return found
