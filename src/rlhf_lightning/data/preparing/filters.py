"""Which rows are wanted, and where they go: filters over whole rows, and splits by the hash of how a prompt opens."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.chat.messages import Prompt, exact_text
from rlhf_lightning.data.preparing.manifest import Part
from rlhf_lightning.data.rows import KINDS, Need, Row, opening_of, prompt_key, split_of
from rlhf_lightning.errors import UserError

SplitBy = Literal["dialogue", "prompt"]
STAGES_OF: dict[Need, tuple[str, ...]] = {
    "finetune": ("sft",),
    "preference": ("reward", "dpo"),
    "prompts": ("ppo",),
    "rated": ("reward",),
}
"""The stages that each kind of example is for, by the names that shares may be given under; one name for each kind."""


@dataclass(frozen=True)
class Filters:
    """What is left out of the data, each reason counted; in this order, and before anything is tokenised.

    Args:
        shuffle: draw the rows in random order, which matters to `num_samples` and to which of several equal rows stays.
        seed: of that order.
        remove_same_inputs: keep the first of the rows with the same prompt and the same best response.
        remove_same_responses: drop pairs that the limits have made equal; those that are equal as text always go.
        duplicates: keep rows that came before, or drop them: `exact` if every character agrees, `normalised` if case
            and white space do not count.
        remove_evaluation_prompts: drop rows of `data` whose prompt occurs in `validation_data` or `test_data`.
    """

    shuffle: bool = False
    seed: int = 42
    remove_same_inputs: bool = False
    remove_same_responses: bool = True
    duplicates: Literal["keep", "exact", "normalised"] = "keep"
    remove_evaluation_prompts: bool = False

    def __post_init__(self) -> None:
        check_arguments(Filters, vars(self), prefix="filters.")

    def order(self, num_rows: int, num_samples: int | None) -> Sequence[int]:
        """Numbers of the rows to read, in order."""
        wanted = num_rows if num_samples is None else min(num_samples, num_rows)
        if not self.shuffle:
            return range(wanted)
        order: list[int] = np.random.default_rng(self.seed).permutation(num_rows)[:wanted].tolist()
        return order


NO_FILTERS = Filters()


@dataclass(frozen=True)
class Splits:
    """Shares of the prompts. A prompt falls where its own text sends it, so it never stands on two sides.

    Args:
        validation: held out for validation.
        test: held out for testing.
        stages: share of each stage, `sft`, `reward` or `dpo`, and `ppo`, summing to 1. `dpo` is the share of the
            preference pairs where they train a policy instead of a reward model; the same share holds the same pairs
            under either name. A stage that is not named gets every row.
        by: what stays together: every `dialogue` that opens with the same turn of the user (and the same system
            turns), or only what is the same `prompt` to its end.

    Raises:
        UserError: shares that cannot be.
    """

    validation: float = 0.0
    test: float = 0.0
    stages: dict[str, float] | None = None
    by: SplitBy = "dialogue"

    def __post_init__(self) -> None:
        if self.by not in get_args(SplitBy):
            raise UserError(f"split_by: {self.by!r} is not one of {', '.join(get_args(SplitBy))}")
        for name, share in (("validation_split", self.validation), ("test_split", self.test)):
            if not 0 <= share < 1:
                raise UserError(f"{name} ({share}) must be at least 0 and below 1")
        if self.validation + self.test >= 1:
            raise UserError(
                f"validation_split ({self.validation}) and test_split ({self.test}) leave nothing to train on"
            )
        if self.stages is not None:
            self._check_stages(self.stages)

    def _check_stages(self, stages: dict[str, float]) -> None:
        known = _stage_names()
        for name in stages:
            if name not in known:
                raise UserError(f"stage_split: {name!r} is not one of {', '.join(known)}")
        for names in STAGES_OF.values():
            if len(named := [name for name in names if name in stages]) > 1:
                raise UserError(
                    f"stage_split: {' and '.join(named)} both read the preference pairs, and no data module could tell "
                    "which are its own; name one of them"
                )
        if any(share < 0 for share in stages.values()) or abs(sum(stages.values()) - 1) > 1e-6:
            said = ", ".join(f"{name} {share}" for name, share in stages.items())
            raise UserError(f"stage_split ({said}) must be shares of at least 0 that sum to 1")

    def key(self, row: Row, key: str) -> str:
        """The text whose hash sends a row to its side."""
        return prompt_key(opening_of(_whole_prompt(row))) if self.by == "dialogue" else key

    def part(self, key: str) -> Part:
        """Where a prompt goes."""
        shares: dict[Part, float] = {"train": 1 - self.validation - self.test, "test": self.test}
        shares["validation"] = self.validation
        part: Part = split_of(key, {name: share for name, share in shares.items() if share})  # type: ignore[assignment]
        return part

    def kinds(self, key: str, kinds: tuple[Need, ...]) -> tuple[Need, ...]:
        """Which of some kinds of example a prompt serves."""
        if self.stages is None:
            return kinds
        # In the order of the stages, not of the YAML, and with a salt, so that stages and parts are independent.
        names = [name for name in _stage_names() if name in self.stages]
        stage = split_of(key, {name: self.stages[name] for name in names if self.stages[name]}, salt="stage:")
        return tuple(kind for kind in kinds if stage in STAGES_OF[kind] or not {*STAGES_OF[kind]} & {*names})


def _stage_names() -> list[str]:
    """All stages, each once: one may be for several kinds of example."""
    return list(dict.fromkeys(name for names in STAGES_OF.values() for name in names))


class RowFilter:
    """Says of each row in turn whether it is wanted; remembers those before by hashes of 8 bytes.

    Args:
        filters: what is not wanted.
        evaluation_prompts: hashes of prompts, see `hash_of`, that are not wanted.
    """

    def __init__(self, filters: Filters, evaluation_prompts: set[int]) -> None:
        self._filters = filters
        self._evaluation_prompts = evaluation_prompts if filters.remove_evaluation_prompts else set()
        self._inputs: set[int] = set()
        self._rows: set[int] = set()

    def reason(self, row: Row, key: str) -> str | None:
        """Why a row is not wanted, or None."""
        filters = self._filters
        prompt, responses = exact_text(row.prompt), [exact_text(response) for response in row.responses]
        more = _more_than_text(row)
        if filters.remove_same_inputs and _seen(self._inputs, prompt, more, row.suffix, *responses[:1]):
            return "prompt and best response came before"
        if filters.duplicates == "exact" and _seen(self._rows, prompt, more, row.suffix, *responses):
            return "row is a duplicate"
        if filters.duplicates == "normalised" and _seen(self._rows, key, more, *map(_normalised, responses)):
            return "row is a duplicate"
        if self._evaluation_prompts and hash_of(key) in self._evaluation_prompts:
            return "prompt is in the evaluation data"
        return None


def key_of(row: Row) -> str:
    """The `prompt_key` of a row, its suffix included."""
    return prompt_key(_whole_prompt(row))


def _whole_prompt(row: Row) -> Prompt:
    """The prompt with its suffix; a whole text, which has none, stands for itself."""
    if not row.prompt:
        return exact_text(row.responses[0])
    return row.prompt + row.suffix if isinstance(row.prompt, str) else row.prompt


def _more_than_text(row: Row) -> str:
    """What the prompt holds that its key does not say, such as tools and calls of them."""
    messages = [] if isinstance(row.prompt, str) else [message for message in row.prompt if len(message) > 2]
    return json.dumps([row.tools, messages]) if row.tools or messages else ""


def hash_of(*texts: str) -> int:
    """A hash of 8 bytes of some texts in order."""
    # Text is sound Unicode here and holds no NUL, see `check_text`, so NUL can stand between.
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "big")


def hash_of_ids(ids: np.ndarray) -> int:
    """A hash of 8 bytes of token ids."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "big")


def narrowed(row: Row, kinds: tuple[Need, ...]) -> Row:
    """A row with only the responses that some kinds of example need, so that no other text is tokenised."""
    if "preference" in kinds:
        return row
    wanted = 1 if {"finetune", "rated"} & {*kinds} else 0
    return row._replace(responses=row.responses[:wanted], ranks=())


_RESPONSES: dict[Need, int] = {"preference": 2, "rated": 1, "finetune": 1, "prompts": 0}
"""Responses that a row must have at least."""


def most_demanding_first(kinds: tuple[Need, ...]) -> tuple[Need, ...]:
    """Kinds of example in such an order that a row parsed for one has all that those after it need."""
    return tuple(kind for kind in _RESPONSES if kind in kinds)


def served(row: Row, kinds: tuple[Need, ...]) -> tuple[Need, ...]:
    """Those of some kinds of example for which a row has responses, and scores, enough."""
    enough = (kind for kind in kinds if len(row.responses) >= _RESPONSES[kind])
    return tuple(kind for kind in enough if kind != "rated" or not all(map(math.isnan, row.scores)))


def in_order(kinds: Sequence[Need]) -> tuple[Need, ...]:
    """Kinds of example, each once, in the order of `KINDS`."""
    return tuple(kind for kind in KINDS if kind in kinds)


def _seen(before: set[int], *texts: str) -> bool:
    number = hash_of(*texts)
    if number in before:
        return True
    before.add(number)
    return False


def _normalised(text: str) -> str:
    return " ".join(text.split()).casefold()
