"""What people said of pairs of answers, in one SQLite file.

A judgement is one transaction and on the disk when `add` returns: whatever kills the process then loses nothing. One
annotator has one judgement of a pair, so that a double click counts once. Several processes may write the same file.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rlhf_lightning.chat.written import WrittenPrompt, from_json, to_json
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional import cohen_kappa
from rlhf_lightning.rng import derive_seed

Choice = Literal["first", "second", "tie", "both bad"]

_SCHEMA = 1
_TABLES = """
CREATE TABLE pairs (
    id TEXT PRIMARY KEY, prompt TEXT NOT NULL, first_model TEXT NOT NULL, second_model TEXT NOT NULL,
    first TEXT NOT NULL, second TEXT NOT NULL, sampling TEXT NOT NULL
) STRICT;
CREATE TABLE judgements (
    pair TEXT NOT NULL REFERENCES pairs (id), annotator TEXT NOT NULL, choice TEXT NOT NULL,
    first_stood_left INTEGER NOT NULL, comment TEXT NOT NULL, made TEXT NOT NULL,
    PRIMARY KEY (pair, annotator)
) STRICT;
"""
_PATIENCE = 5.0
"""Seconds to wait for another process that writes the file."""


class Pair(NamedTuple):
    """Two answers to one prompt.

    Attributes:
        written: the prompt.
        first_model: what gave the first answer.
        second_model: what gave the second one.
        first: an answer.
        second: another.
        sampling: how they were drawn.
    """

    written: WrittenPrompt
    first_model: str
    second_model: str
    first: str
    second: str
    sampling: dict[str, Any]

    @property
    def id(self) -> str:
        """The same for the same pair, wherever it was made."""
        return f"{derive_seed(to_json(self.written) or '', *self[1:5]):016x}"

    def first_is_left(self, seed: int, annotator: str) -> bool:
        """On which side an annotator sees the first answer; by the seed, and the same each time.

        Args:
            seed: of the page.
            annotator: who is asked.
        """
        return derive_seed(seed, self.id, annotator) % 2 == 0


class Judgement(NamedTuple):
    """What somebody said of a pair.

    Attributes:
        pair: the two answers.
        annotator: who.
        choice: the better answer, a tie, or both bad.
        first_stood_left: the sides they were on.
        comment: why, if anything was said.
        made: when, UTC, ISO 8601.
    """

    pair: Pair
    annotator: str
    choice: Choice
    first_stood_left: bool
    comment: str = ""
    made: str = ""


class Agreement(NamedTuple):
    """How far two annotators agree.

    Attributes:
        first: one of them.
        second: the other.
        pairs: how many pairs both judged.
        kappa: Cohen's, over the four choices; None where it is not defined.
    """

    first: str
    second: str
    pairs: int
    kappa: float | None


class Judgements:
    """The judgements of one file.

    Args:
        path: made if it is not there.

    Raises:
        UserError: another kind of file, one of another version, or one that cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._one_at_a_time = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, _PATIENCE, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"judgements '{self.path}' cannot be opened ({error}); name a file that can be written"
            ) from error
        self._look()  # before a write-ahead log is begun: another's file stays as it is
        with self._transaction() as file:
            if self._look():
                for statement in _TABLES.split(";"):
                    file.execute(statement)
                file.execute(f"PRAGMA user_version = {_SCHEMA}")

    def _look(self) -> bool:
        """Whether the file is new.

        Raises:
            UserError: it is of another kind or version.
        """
        try:
            version, tables = self._file.execute(_LOOK).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        if version == 0 and tables == 0:
            return True
        if version != _SCHEMA:
            raise UserError(
                f"judgements '{self.path}' is an SQLite file of another kind or version (version {version}, "
                f"expected {_SCHEMA}); name another file"
            )
        return False

    def _unusable(self, error: sqlite3.Error) -> UserError:
        busy = "locked" in str(error) or "busy" in str(error)
        hint = "another process holds it; end that one, or try again" if busy else "name another file"
        return UserError(f"judgements '{self.path}' cannot be used ({error}); {hint}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, one thread and one process at a time."""
        with self._one_at_a_time:
            try:
                # A write-ahead log, synced with every transaction.
                mode = self._begin_log()
                if mode != "wal":
                    raise UserError(
                        f"judgements '{self.path}': this disk has no room for a write-ahead log (journal mode {mode}); "
                        "name a file on a local disk"
                    )
                self._file.execute("PRAGMA synchronous = FULL")
                self._file.execute("BEGIN IMMEDIATE")
                try:
                    yield self._file
                    self._file.execute("COMMIT")
                except BaseException:
                    self._file.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def _begin_log(self) -> str:
        """Use a write-ahead log; SQLite itself does not wait for another process that begins one, too."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return str(self._file.execute("PRAGMA journal_mode = WAL").fetchone()[0])
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def add(self, judgement: Judgement) -> bool:
        """Keep a judgement; it is on the disk when this returns.

        Args:
            judgement: `made` is filled in.

        Returns:
            False if its annotator has judged the pair before: the first judgement stands.

        Raises:
            UserError: a choice that there is not, no annotator, or a file that cannot be written.
        """
        if judgement.choice not in get_args(Choice):
            raise UserError(f"choice {judgement.choice!r} is none of {', '.join(get_args(Choice))}")
        if not judgement.annotator.strip():
            raise UserError("a judgement needs the name of its annotator")
        pair, made = judgement.pair, datetime.now(timezone.utc).isoformat(timespec="seconds")
        asked, sampling = to_json(pair.written), json.dumps(pair.sampling, sort_keys=True)
        with self._transaction() as file:
            values = (pair.id, asked, *pair[1:5], sampling)
            file.execute("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            said = (pair.id, judgement.annotator.strip(), judgement.choice, judgement.first_stood_left)
            added = file.execute(
                "INSERT OR IGNORE INTO judgements VALUES (?, ?, ?, ?, ?, ?)", (*said, judgement.comment.strip(), made)
            )
            return added.rowcount == 1

    def all(self) -> list[Judgement]:
        """Every judgement, in the order they were made."""
        query = (
            "SELECT prompt, first_model, second_model, first, second, sampling, annotator, choice, first_stood_left, "
            "comment, made FROM judgements JOIN pairs ON pairs.id = pair ORDER BY judgements.rowid"
        )
        with self._transaction() as file:
            rows = file.execute(query).fetchall()
        found = []
        for prompt, model, other_model, first, second, sampling, annotator, choice, left, comment, made in rows:
            written = from_json(prompt)
            assert written is not None
            pair = Pair(written, model, other_model, first, second, json.loads(sampling))
            found.append(Judgement(pair, annotator, choice, bool(left), comment, made))
        return found

    def agreement(self) -> list[Agreement]:
        """Of every two annotators who judged some of the same pairs."""
        by: dict[str, dict[str, str]] = {}
        for judgement in self.all():
            by.setdefault(judgement.annotator, {})[judgement.pair.id] = judgement.choice
        found = []
        for one, other in combinations(sorted(by), 2):
            common = sorted(by[one].keys() & by[other].keys())
            if common:
                kappa = cohen_kappa([by[one][pair] for pair in common], [by[other][pair] for pair in common])
                found.append(Agreement(one, other, len(common), kappa))
        return found

    def preferences(self) -> list[dict[str, Any]]:
        """Rows that `PreferenceDataModule` reads: `prompt`, `chosen` and `rejected`, and `tools` if there were any.

        Ties, and pairs that were both bad, say nothing of which answer is better and are left out.
        """
        rows = []
        for judgement in self.all():
            pair = judgement.pair
            if judgement.choice in ("first", "second"):
                answers = (pair.first, pair.second) if judgement.choice == "first" else (pair.second, pair.first)
                row = {"prompt": pair.written.prompt, "chosen": answers[0], "rejected": answers[1]}
                rows.append(row | ({"tools": list(pair.written.tools)} if pair.written.tools else {}))
        return rows

    def export(self, path: str | Path) -> int:
        """Write the preferences as lines of JSON; returns how many.

        Args:
            path: replaced if it is there.
        """
        rows = self.preferences()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(path).expanduser().write_text(lines, encoding="utf-8")
        return len(rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_LOOK = "SELECT user_version, (SELECT count(*) FROM sqlite_schema) FROM pragma_user_version"
"""In one statement, so that nobody writes between the two."""
