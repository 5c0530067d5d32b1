"""A prepared folder: rows as token ids in Arrow files, which every process maps into memory instead of reading.

One folder holds, for each kind of example it was made for, three files, which may hold no rows:

* `finetune_train.arrow`, `finetune_validation.arrow`, `finetune_test.arrow`: prompt, turns, response
* `preference_*.arrow`: prompt, chosen, rejected, margin, weight
* `prompts_*.arrow`: prompt, and the prompt as its row wrote it, for rewards that do not read these ids
* `rated_*.arrow`: prompt, response, and its scores, float32, NaN where nobody has said
* `prompt_hashes.npz`: which prompts each of them holds, whatever the tokenizer
* `args.json`, `example_prompt.json`, and `manifest.json`, which is written last and says what belongs to the folder,
  with checksums

Ids are int32; every row carries the number of its row in the data and of its source.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.written import from_json, to_json
from rlhf_lightning.data.collate import EncodedExample, EncodedPair, EncodedPrompt, EncodedRating
from rlhf_lightning.data.preparing.columns import (
    float_list_array,
    list_array,
    list_views,
    number_array,
    text_array,
    view,
)
from rlhf_lightning.data.preparing.manifest import (
    FORMAT,
    PARTS,
    PROMPT_HASHES,
    Part,
    file_name,
    is_checked,
    read_manifest,
    write_json,
    write_manifest,
)
from rlhf_lightning.data.rows import Need
from rlhf_lightning.errors import UserError

Example = EncodedExample | EncodedPair | EncodedPrompt | EncodedRating
_LISTS: dict[Need, tuple[str, ...]] = {
    "finetune": ("prompt", "turns", "response"),
    "preference": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
    "rated": ("prompt", "response"),
}
_NUMBERS: dict[Need, dict[str, Any]] = {
    "finetune": {"row_id": np.int64, "source": np.int16},
    "preference": {"margin": np.float32, "weight": np.float32, "row_id": np.int64, "source": np.int16},
    "prompts": {"row_id": np.int64, "source": np.int16},
    "rated": {"row_id": np.int64, "source": np.int16},
}
_WRITTEN = "written"
"""Column of the prompts that holds each as its row wrote it, as JSON; null where that is not known."""
_SCORES = "scores"
"""Column of what rated responses were given."""
_FLUSH = 1000  # rows of one record batch


class TableWriter:
    """Writes one part, some rows at a time.

    Attributes:
        rows: rows written.
        tokens: ids written.
        prompt_hashes: of the prompts of the rows.
    """

    def __init__(self, path: Path, need: Need) -> None:
        self.path, self._need = path, need
        self._schema = _schema(need)
        self._writer = pa.ipc.new_file(str(path), self._schema)
        self._waiting: list[tuple[Any, ...]] = []
        self.rows = self.tokens = 0
        self.prompt_hashes = array("Q")

    def add(
        self,
        example: Example,
        source: int = 0,
        prompt_hash: int | None = None,
    ) -> None:
        """Write one row, and keep the hash of its prompt as text, where that is known."""
        self._waiting.append(_cells(example, source))
        if prompt_hash is not None:
            self.prompt_hashes.append(prompt_hash)
        self.rows += 1
        if len(self._waiting) == _FLUSH:
            self._flush()

    def close(self) -> None:
        """Write what waits, and end the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        columns = list(zip(*self._waiting, strict=True))
        lists = _LISTS[self._need]
        arrays = [list_array(column) for column in columns[: len(lists)]]
        self.tokens += sum(len(array.values) for name, array in zip(lists, arrays, strict=False) if name != "turns")
        numbers = zip(columns[len(lists) :], _NUMBERS[self._need].values(), strict=False)
        arrays += [number_array(np.array(column, kind)) for column, kind in numbers]
        if self._need == "prompts":
            arrays.append(text_array([to_json(written) for written in columns[-1]]))
        if self._need == "rated":
            arrays.append(float_list_array([np.asarray(scores) for scores in columns[-1]]))
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._waiting = []


def _schema(need: Need) -> pa.Schema:
    fields = [pa.field(name, pa.list_(pa.int32())) for name in _LISTS[need]]
    fields += [pa.field(name, pa.from_numpy_dtype(kind)) for name, kind in _NUMBERS[need].items()]
    fields += [pa.field(_WRITTEN, pa.large_string())] if need == "prompts" else []
    fields += [pa.field(_SCORES, pa.list_(pa.float32()))] if need == "rated" else []
    return pa.schema(fields)


def _cells(example: Example, source: int) -> tuple[Any, ...]:
    """What stands in the columns of an example, in their order."""
    if isinstance(example, EncodedPrompt):
        return example.ids, example.row_id, source, example.written
    length = example.prompt_length
    if isinstance(example, EncodedRating):
        return example.ids[:length], example.ids[length:], example.row_id, source, example.scores
    if isinstance(example, EncodedExample):
        return example.ids[:length], example.turns, example.ids[length:], example.row_id, source
    prompt, sides = example.chosen_ids[:length], (example.chosen_ids[length:], example.rejected_ids[length:])
    return prompt, *sides, example.margin, example.weight, example.row_id, source


class TokenTable(Sequence[Any]):
    """One part of a prepared folder, mapped into memory; pickled by its path.

    Items are `EncodedExample`, `EncodedPair`, `EncodedRating` or `EncodedPrompt` (without its text), copied out of the
    file.

    Attributes:
        row_ids: number of each row in the data, `[N]`, int64.
        sources: number of each row's source, `[N]`, int16.
        margins: of preferences, `[N]`, float32.
        weights: of preferences, `[N]`, float32.
    """

    def __init__(self, path: str | Path, need: Need) -> None:
        self.path, self.need = Path(path), need
        # Batches lie in the mapped file; what is made here are views of them and the few numbers of each row.
        batches = _batches(self.path, need)
        self._starts = np.cumsum([0, *(len(batch) for batch in batches)])
        self._lists = {name: [list_views(batch.column(name)) for batch in batches] for name in _LISTS[need]}
        numbers = {
            name: np.concatenate([np.zeros(0, kind), *(view(batch.column(name), kind) for batch in batches)])
            for name, kind in _NUMBERS[need].items()
        }
        self._scores = [_floats(batch.column(_SCORES)) for batch in batches] if need == "rated" else []
        self._written = [batch.column(_WRITTEN) for batch in batches] if need == "prompts" else []
        self.row_ids, self.sources = numbers["row_id"], numbers["source"]
        self.margins, self.weights = numbers.get("margin"), numbers.get("weight")

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        """One example, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = range(len(self))[index]
        prompt, *others = self.ids(row)
        row_id = int(self.row_ids[row])
        if self.need == "finetune":
            turns, response = others
            return EncodedExample(np.concatenate([prompt, response]), len(prompt), row_id, turns.copy())
        if self.need == "rated":
            batch, i = self._place(row)
            offsets, values = self._scores[batch]
            whole = np.concatenate([prompt, *others])
            return EncodedRating(whole, len(prompt), row_id, values[offsets[i] : offsets[i + 1]].copy())
        if self.need == "prompts":
            batch, i = self._place(row)
            written = from_json(self._written[batch][i].as_py())
            return EncodedPrompt(prompt.copy(), "", row_id, written, int(self.sources[row]))
        chosen, rejected = (np.concatenate([prompt, response]) for response in others)
        assert self.margins is not None
        assert self.weights is not None
        return EncodedPair(chosen, rejected, len(prompt), row_id, float(self.margins[row]), float(self.weights[row]))

    def ids(self, row: int) -> list[np.ndarray]:
        """The lists of one row in the order of the columns, as read-only views of the file."""
        batch, i = self._place(row)
        views = [batches[batch] for batches in self._lists.values()]
        return [values[offsets[i] : offsets[i + 1]] for offsets, values in views]

    def _place(self, row: int) -> tuple[int, int]:
        """In which record batch a row lies, and where in it."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return batch, row - int(self._starts[batch])

    def lengths(self, column: str) -> np.ndarray:
        """Tokens of every row in one column, `[N]`, int64.

        Args:
            column: `prompt`, `response`, `chosen` or `rejected`.
        """
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for offsets, _ in self._lists[column])])

    @property
    def total_lengths(self) -> np.ndarray:
        """Tokens of prompt and longest response together, `[N]`, int64."""
        responses = [self.lengths(name) for name in _LISTS[self.need] if name not in ("prompt", "turns")]
        prompts = self.lengths("prompt")
        return prompts + np.maximum.reduce(responses) if responses else prompts

    @property
    def largest_id(self) -> int:
        """The largest id of all rows, -1 without any; reads the whole file."""
        return max((int(values.max(initial=-1)) for values in self._ids()), default=-1)

    @property
    def smallest_id(self) -> int:
        """The smallest id of all rows, 0 without any; reads the whole file."""
        return min((int(values.min(initial=0)) for values in self._ids()), default=0)

    def _ids(self) -> Iterator[np.ndarray]:
        return (values for name in self._lists if name != "turns" for _, values in self._lists[name])

    @cached_property
    def identity(self) -> str:
        """A hash of which rows these are, in which order, and how long each is; of their tokens none is read."""
        return hashlib.blake2b(self.row_ids.tobytes() + self.total_lengths.tobytes(), digest_size=8).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """A path says it all; the copy maps the file anew."""
        return TokenTable, (self.path, self.need)


def _batches(path: Path, need: Need) -> list[pa.RecordBatch]:
    """The record batches of a file, whose offsets lie within it: a folder without checksums may be damaged."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UserError(f"{path} cannot be read ({reason}); run `rlhf prepare` again") from error
    nulls = (batch.column(name).null_count for batch in batches for name in batch.schema.names if name != _WRITTEN)
    if not reader.schema.equals(_schema(need)) or any(nulls):
        raise UserError(f"{path} does not hold the columns of {need}; run `rlhf prepare` again")
    return batches


def _floats(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and values of a column of lists of numbers, without a copy."""
    return view(column.offsets, np.int32), view(column.values, np.float32)


class Derived(Sequence[Any]):
    """A sequence made on demand from another, some items of each of its items.

    Args:
        items: the other.
        make: gives the items of one of its items.
        each: how many these are.
    """

    def __init__(self, items: Sequence[Any], make: Callable[[Any], Sequence[Any]], each: int = 1) -> None:
        self._items, self._make, self._each = items, make, each

    def __len__(self) -> int:
        """Number of items."""
        return len(self._items) * self._each

    def __getitem__(self, index: Any) -> Any:
        """One item."""
        number, part = divmod(range(len(self))[index], self._each)
        return self._make(self._items[number])[part]


class PreparedFolder:
    """A prepared folder, open for reading."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> PreparedFolder:
        """Open a folder after checking that it is complete and as it was written; each process checks it once.

        Raises:
            UserError: it is not a prepared folder, of another version, not complete, or damaged.
        """
        path = Path(path).expanduser()
        return cls(path, read_manifest(path))

    def has(self, need: Need, part: Part = "train") -> bool:
        """Whether the folder holds such a part."""
        return file_name(need, part) in self.manifest["parts"]

    def part(self, need: Need, part: Part) -> TokenTable:
        """One part, mapped into memory.

        Raises:
            UserError: the folder does not hold it.
        """
        if not self.has(need, part):
            kinds = ", ".join(self.manifest["kinds"])
            raise UserError(f"{self.path} holds no {file_name(need, part)}, only {kinds}; prepare it with {need}")
        return TokenTable(self.path / file_name(need, part), need)

    def prompt_hashes(self, need: Need, part: Part) -> np.ndarray:
        """Hashes of 8 bytes of the prompts of one part as text, sorted, each once, uint64; none, if none are known.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / PROMPT_HASHES
        if not path.is_file():
            return np.zeros(0, np.uint64)
        try:
            with np.load(path, allow_pickle=False) as hashes:
                return np.asarray(hashes[Path(file_name(need, part)).stem], dtype=np.uint64)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); run `rlhf prepare` again") from error

    def largest_id(self, need: Need) -> int:
        """The largest id of all parts; reads the whole files."""
        return max(self.part(need, part).largest_id for part in PARTS)

    def check_tokenizer(self, chat: ChatEncoder) -> None:
        """Refuse ids that mean something else to this tokenizer, or dialogues written another way.

        Of a folder without checksums the ids are looked at, too.

        Raises:
            UserError: the folder was made with others; both are named. Or it holds ids that the tokenizer has not.
        """
        if self.manifest["chat"]["fingerprint"] == chat.fingerprint():
            self._check_ids(len(chat.tokenizer))
            return
        theirs, ours = self.manifest["chat"], chat.describe()
        differ = [name for name in ours if name != "tokenizer" and theirs.get(name) != ours[name]]
        raise UserError(
            f"{self.path} was prepared with {_chat_name(theirs, differ)}, now it is {_chat_name(ours, differ)}; "
            "use that tokenizer and template, or run `rlhf prepare` again"
        )

    def _check_ids(self, size: int) -> None:
        if is_checked(self.manifest):
            return
        for table in (self.part(need, part) for need in self.manifest["kinds"] for part in PARTS):
            if table.smallest_id < 0 or table.largest_id >= size:
                raise UserError(f"{table.path} is damaged: it holds ids that are none; run `rlhf prepare` again")


def _chat_name(said: Mapping[str, Any], differ: Sequence[str]) -> str:
    """A tokenizer with the things in which it differs from another."""
    details = ", ".join(f"{name.replace('_', ' ')} {said.get(name)}" for name in differ)
    return f"tokenizer {said['tokenizer']} ({details})" if details else f"tokenizer {said['tokenizer']}"


class FolderWriter:
    """Fills a new prepared folder."""

    def __init__(self, path: Path, kinds: Sequence[Need]) -> None:
        self.path, self.kinds = path, list(kinds)
        self._writers: dict[tuple[str, str], TableWriter] = {
            (need, part): TableWriter(path / file_name(need, part), need) for need in kinds for part in PARTS
        }

    def __getitem__(self, place: tuple[str, str]) -> TableWriter:
        """The writer of one part, by kind and part."""
        return self._writers[place]

    def close(self) -> None:
        """End all files and see them onto the disk."""
        for writer in self._writers.values():
            writer.close()
            with writer.path.open("rb") as file:
                os.fsync(file.fileno())

    def finish(self, manifest: Mapping[str, Any], args: Mapping[str, Any], chat: ChatEncoder) -> None:
        """Write what goes with the tables; the manifest comes last.

        Args:
            manifest: all but `format`, `kinds`, `chat` and `parts`.
            args: what the folder was made with.
            chat: what made the ids.
        """
        write_json(self.path / "args.json", args)
        write_json(self.path / "example_prompt.json", example_prompt(chat))
        parts = {writer.path.name: {"rows": writer.rows, "tokens": writer.tokens} for writer in self._writers.values()}
        hashes: dict[str, Any] = {
            w.path.stem: np.unique(np.frombuffer(w.prompt_hashes, np.uint64)) for w in self._writers.values()
        }
        np.savez(self.path / PROMPT_HASHES, **hashes)
        said = {"fingerprint": chat.fingerprint(), **chat.describe()}
        whole = {"format": FORMAT, "kinds": self.kinds, "chat": said, **manifest, "parts": parts}
        write_manifest(self.path, whole, ("args.json", "example_prompt.json", PROMPT_HASHES))


def example_prompt(chat: ChatEncoder) -> dict[str, Any]:
    """A prompt that is not from the data, to try a trained model with: its text, ids and attention mask."""
    text, ids = chat.encode_prompt("\n\nHuman: How does a computer work?\n\nAssistant:")
    return {"prompt": text, "input_ids": [int(i) for i in ids], "attention_mask": [1] * len(ids)}
