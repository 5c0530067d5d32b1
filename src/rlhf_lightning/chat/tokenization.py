"""Texts to ids, without what tokenizers add unasked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.control_tokens import MARK, ControlTokens, is_thought
from rlhf_lightning.chat.messages import Spans

Placed = tuple[list[int], list[tuple[int, int]]]
"""Ids, and for each the characters that it stands for."""


def default_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids a tokenizer puts before a text unasked: its BOS, or nothing."""
    with_special = tokenizer("x").input_ids
    plain = tokenizer("x", add_special_tokens=False).input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return list(with_special[:start])
    return []


class TextTokens:
    """Texts to ids by one tokenizer, without the ids that it adds unasked.

    Args:
        tokenizer: used as it is.

    Attributes:
        control: its control tokens: the special ones, and those of `more`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: Iterable[str] = ()) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | {str(t) for t in tokenizer.all_special_tokens}
        self.control = ControlTokens({*special, *more})
        """All of them, for what users say."""
        self.control_of_answers = ControlTokens(token for token in {*special, *more} if not is_thought(token))
        """All but those around thoughts, which the assistant's messages may hold and templates look for."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; a hidden control token becomes ordinary tokens."""
        if not texts:
            return []
        backend = self.backend
        if backend is not None:
            ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            # verbose=False: lengths beyond the model's are ours to cut, no cause for a warning here.
            encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids = [list(row) for row in encoded["input_ids"]]
        for i, text in enumerate(texts):
            if MARK in text and (marks := self.control.marks(text)):
                ids[i] = self._without_marks(text, marks)[0] if backend is not None else self._pieces(text, marks)
        return ids

    def placed(self, texts: Sequence[str]) -> list[Placed]:
        """Ids of each text and the characters that they stand for; the tokenizer must be a fast one."""
        backend = self.backend
        encodings = backend.encode_batch(texts, add_special_tokens=False) if texts else []
        rows = [(encoding.ids, encoding.offsets) for encoding in encodings]
        for i, text in enumerate(texts):
            if MARK in text and (marks := self.control.marks(text)):
                rows[i] = self._without_marks(text, marks)
        return rows

    @property
    def backend(self) -> Any:
        """What works inside a fast tokenizer, a third faster by itself; None for a slow one."""
        if not self.tokenizer.is_fast:
            return None
        backend = self.tokenizer.backend_tokenizer
        # What another call, or the tokenizer's file, has set must not cut or fill ours.
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def splitting(self) -> frozenset[str]:
        """Tokens at which the tokenizer divides a text before all else: what follows one changes nothing before it."""
        if self.backend is None:
            return frozenset()
        unchanged = self.backend.normalizer is None
        added = self.backend.get_added_tokens_decoder().values()
        return frozenset(
            t.content for t in added if not t.lstrip and not t.single_word and (unchanged or not t.normalized)
        )

    def _without_marks(self, text: str, marks: Sequence[int]) -> Placed:
        encoding = self.backend.encode(text, add_special_tokens=False)
        places = [(mark, mark + 1) for mark in marks]
        kept, offsets = [], []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if (start, end) in places:
                continue
            if any(start <= mark < end for mark in marks):
                return self._placed_pieces(text, marks)
            kept.append(token)
            offsets.append((start, end))
        return kept, offsets

    def _placed_pieces(self, text: str, marks: Sequence[int]) -> Placed:
        """The pieces between the marks apart, where a token would hold a mark and more."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in _between(marks, len(text)):
            encoding = self.backend.encode(text[start:end], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(a + start, b + start) for a, b in encoding.offsets]
        return ids, offsets

    def _pieces(self, text: str, marks: Sequence[int]) -> list[int]:
        pieces = [text[start:end] for start, end in _between(marks, len(text))]
        return [token for piece in pieces for token in self.tokenizer(piece, add_special_tokens=False).input_ids]


def token_spans(offsets: Sequence[tuple[int, int]], spans: Spans, shift: int) -> list[int]:
    """Parts of a text in tokens, first and one after the last of each, `shift` tokens further on.

    A token across a border is left out, a part without a token too.
    """
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts = np.searchsorted(places[:, 0], [start for start, _ in spans], side="left")
    ends = np.searchsorted(places[:, 1], [end for _, end in spans], side="right")
    return [int(place) + shift for pair in zip(starts, ends, strict=True) if pair[0] < pair[1] for place in pair]


def shared_start(sequences: Sequence[str] | Sequence[list[int]]) -> int:
    """How many items all sequences begin with alike.

    Example:
        >>> shared_start([[1, 2, 3], [1, 2], [1, 2, 4]])
        2
    """
    least: Any = min(sequences)
    most: Any = max(sequences)
    return next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))


def _between(marks: Sequence[int], length: int) -> list[tuple[int, int]]:
    return list(zip([0, *(mark + 1 for mark in marks)], [*marks, length], strict=True))
