"""The text of a response while its tokens come in.

What later tokens may still change is held back: the first bytes of a character, and tokens that are single bytes, which
many tokenizers spell as a group, to its end. All else that the decoders of tokenizers write is settled once it stands
there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_HALF = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet."""


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """Text of a response without special tokens, as it continues its prompt (leading space included).

    Args:
        tokenizer: the policy's.
        ids: of the response, `[r]`.
    """
    # Not tidied up: what is scored is what was said.
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextSoFar:
    """Reads a response, of which each text is the beginning of the next, and the last is that of all tokens.

    Args:
        tokenizer: the policy's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._unwritten = added | set(tokenizer.all_special_ids)

    def read(self, ids: Sequence[int], complete: bool = False) -> str:
        """The text that is settled.

        Args:
            ids: all tokens so far.
            complete: none will follow.
        """
        if complete:
            return decode_response(self._tokenizer, ids)
        return decode_response(self._tokenizer, ids[: self._settled(ids)]).rstrip(_HALF)

    def _settled(self, ids: Sequence[int]) -> int:
        """How many tokens stand before a group of single bytes at the end."""
        count = len(ids)
        for place in range(len(ids) - 1, -1, -1):
            token = None if ids[place] in self._unwritten else self._tokenizer.convert_ids_to_tokens(ids[place])
            if token is None:  # written as nothing, so that bytes before it and after it are one group
                continue
            if not _BYTE.fullmatch(str(token)):
                break
            count = place
        return count


def text_by(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], whole: str) -> str:
    """What the first tokens of a response that is complete have said of its text; nothing needs to be held back then.

    Args:
        tokenizer: the policy's.
        ids: the first tokens.
        whole: text of all of them.
    """
    return commonprefix([whole, decode_response(tokenizer, ids)])  # noqa: RUF071  # of characters, as is meant


def completes_stop(text: str, begun: str, stop_strings: Sequence[str]) -> bool:
    """Whether a text completes a stop string after its beginning, into which the string may reach.

    Args:
        text: of a response.
        begun: its beginning, in which none may end it.
        stop_strings: what ends it.

    Example:
        >>> completes_stop("one. two", "one.", ["."]), completes_stop("one. two", "one.", [". t"])
        (False, True)
    """
    return any(text.find(stop, max(0, len(begun) - len(stop) + 1)) >= 0 for stop in stop_strings)
