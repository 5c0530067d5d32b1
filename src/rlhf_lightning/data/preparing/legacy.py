"""Prepared folders in the layout of SheepRL's RLHF examples, converted into one of our own.

Such a folder holds `finetune_{train,validation,test}.pt` (a list of dicts `prompt_len`, `input_ids`, `targets`),
`preference_*.pt` (`prompt_len`, `chosen_input_ids`, `rejected_input_ids`), `example_prompt.pt` and `args.json`. The
files are pickles; they are read by `torch.load(weights_only=True)`, which runs no code from them. `targets` says only
which tokens were masked, which `loss_on` says here.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.data.collate import EncodedExample, EncodedPair, EncodedPrompt
from rlhf_lightning.data.preparing.counts import Counts
from rlhf_lightning.data.preparing.examples import DUPLICATE
from rlhf_lightning.data.preparing.manifest import FORMAT, PARTS
from rlhf_lightning.data.preparing.prepared import FolderWriter
from rlhf_lightning.data.rows import Need
from rlhf_lightning.data.sources.files import file_fingerprint
from rlhf_lightning.errors import UserError

_KEYS = {"finetune": ("input_ids",), "preference": ("chosen_input_ids", "rejected_input_ids")}


def is_legacy(data: Any) -> bool:
    """Whether some data is the path of a folder in that layout."""
    if not isinstance(data, str | Path):
        return False
    folder = Path(data).expanduser()
    return any((folder / f"{kind}_train.pt").is_file() for kind in _KEYS)


@dataclass
class LegacyPreparation:
    """Such a folder, to be converted for one kind of example.

    Args:
        folder: in that layout.
        need: kind of example; prompts are those of the demonstrations, or else of the preferences.
        chat: the tokenizer that is to be used, which must be the one the folder was made with.
    """

    folder: Path
    need: Need
    chat: ChatEncoder

    def key(self) -> str:
        """A hash of everything that decides what `build` writes."""
        parts = [FORMAT, self.need, self.chat.fingerprint(), *map(file_fingerprint, self._files().values())]
        example = self.folder / "example_prompt.pt"
        parts += [file_fingerprint(example)] if example.is_file() else []
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def build(self, folder: Path) -> None:
        """Write everything into an empty folder, its manifest last.

        Raises:
            UserError: another tokenizer made the files, or they do not hold what they should.
        """
        self._check_example()
        writer = FolderWriter(folder, [self.need])
        counts = Counts()
        for part, path in self._files().items():
            self._convert(path, part, writer, counts)
        writer.close()
        source = {
            "name": str(self.folder),
            "source_names": [self.folder.name],
            "source_weights": [1.0],
            "counts": counts.said(),
            "bad_rows": {"count": 0, "first": []},
        }
        arguments = {"kinds": [self.need], "find_turns": False, "legacy": self._args()}
        writer.finish({"key": self.key(), "arguments": arguments, "sources": {"data": source}}, arguments, self.chat)

    @property
    def _kind(self) -> str:
        """The kind of file to read."""
        wanted = ("finetune", "preference") if self.need == "prompts" else (self.need,)
        for kind in wanted:
            if (self.folder / f"{kind}_train.pt").is_file():
                return kind
        raise UserError(f"{self.folder} holds no {wanted[0]}_train.pt; give a folder that does")

    def _files(self) -> dict[str, Path]:
        paths = {part: self.folder / f"{self._kind}_{part}.pt" for part in PARTS}
        return {part: path for part, path in paths.items() if path.is_file()}

    def _convert(self, path: Path, part: str, writer: FolderWriter, counts: Counts) -> None:
        table, seen = writer[self.need, part], set()
        for number, (length, sequences) in enumerate(self._rows(path)):
            counts.rows += 1
            prompt = sequences[0][:length]
            if self.need == "prompts" and prompt.tobytes() in seen:
                counts.dropped[DUPLICATE] += 1
                continue
            if self.need != "prompts" and any(len(ids) <= length for ids in sequences):
                counts.dropped["nothing is left of a response"] += 1
                continue
            counts.kept += 1
            if self.need == "prompts":
                seen.add(prompt.tobytes())
                table.add(EncodedPrompt(prompt, "", number))
            elif self.need == "finetune":
                table.add(EncodedExample(sequences[0], length, number))
            else:
                table.add(EncodedPair(sequences[0], sequences[1], length, number))

    def _rows(self, path: Path) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Length of the prompt, and prompt and response joined, of each row of a file."""
        size = len(self.chat.tokenizer)
        rows = _load(path)
        if not isinstance(rows, list):
            raise UserError(f"{path} holds no list of rows but {type(rows).__name__}")
        for number, row in enumerate(rows):
            try:
                length = operator.index(row["prompt_len"])
                sequences = [_ids(row[key]) for key in _KEYS[self._kind]]
                if length < 0:
                    raise ValueError(f"prompt_len {length} is below 0")
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"{path} row {number} is not as it should be ({type(error).__name__}: {error}); "
                    f"expected prompt_len and {', '.join(_KEYS[self._kind])}"
                ) from error
            if any(int(ids.min(initial=0)) < 0 for ids in sequences):
                raise UserError(f"{path} row {number} holds an id below 0; prepare the data again")
            largest = max(int(ids.max(initial=0)) for ids in sequences)
            if largest >= size:
                raise UserError(f"{path} row {number} holds id {largest}, {self._differs()}")
            yield length, [ids.astype(np.int32) for ids in sequences]

    def _check_example(self) -> None:
        """Refuse another tokenizer or form of dialogue: the example prompt must give the same ids."""
        path = self.folder / "example_prompt.pt"
        if not path.is_file():
            return
        example = _load(path)
        try:
            theirs = np.asarray(example["input_ids"]).reshape(-1).tolist()
            ours = self.chat.encode_prompt(str(example["prompt"]))[1].tolist()
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(f"{path} has no prompt and input_ids; take it away to go without this check") from error
        bos = self.chat.tokenizer.bos_token_id  # which they write before every text, and some tokenizers do not
        if theirs[theirs[:1] == [bos] :] != ours[ours[:1] == [bos] :]:
            raise UserError(f"{path} has other ids for its text, {self._differs()}")

    def _differs(self) -> str:
        args = self._args()
        name = next((args[key] for key in ("tokenizer_name", "model_name") if args.get(key)), "another tokenizer")
        said = self.chat.describe()
        template = "its chat template" if said["template_hash"] else "no chat template"
        return (
            f"so {self.folder} was prepared with {name} and no chat template, now it is {said['tokenizer']} with "
            f"{template}; use that tokenizer, or prepare the data again"
        )

    def _args(self) -> dict[str, Any]:
        path = self.folder / "args.json"
        if not path.is_file():
            return {}
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise UserError(f"{path} is no JSON object; take it away to go without it")
        return said


def _ids(value: Any) -> np.ndarray:
    """Whole numbers, in a list, array or tensor."""
    found = np.asarray(value)
    if found.size and found.dtype.kind not in "iu":
        raise ValueError(f"ids are {found.dtype}, not whole numbers")
    return found.reshape(-1).astype(np.int64)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damage, or an object that is not read, makes of it
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UserError(f"{path} cannot be read as plain tensors, lists and numbers ({reason})") from error
