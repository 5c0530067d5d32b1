"""Control tokens (special tokens and their like), which a text may hold without meaning them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

RESERVED = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>")
"""Tokens that vocabularies carry for this purpose or that ordinary text never contains, most fitting first."""

MARK = "\U0010fffd"
"""The last character for private use, which hides a control token; its own tokens are taken out again."""
_THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)


def is_thought(token: str) -> bool:
    """Whether a token opens or closes what a model thinks, which its messages may write themselves."""
    return bool(_THOUGHT.search(token))


class ControlTokens:
    r"""Finds control tokens in texts, and writes them so that no tokenizer takes them for what they say.

    Args:
        tokens: as texts; those of one character, and those of white space alone, are text to us.

    Example:
        >>> control = ControlTokens(["<|end|>"])
        >>> hidden = control.hide("say <|end|>")
        >>> hidden == "say <|end|>", control.shown(hidden)
        (False, 'say <|end|>')
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        # Vocabularies add runs of spaces and line breaks for brevity; no turn ends at one of them.
        meant = (token for token in tokens if len(token) > 1 and not token.isspace())
        longest_first = sorted(meant, key=lambda token: (-len(token), token))
        self._tokens = _any_of(longest_first)
        self._hidden = _any_of([token[0] + MARK + token[1:] for token in longest_first])

    def within(self, text: str) -> bool:
        """Whether a text holds one."""
        return self._tokens.search(text) is not None

    def first(self, text: str) -> re.Match[str] | None:
        """The first in a text."""
        return self._tokens.search(text)

    def all(self, text: str) -> list[str]:
        """All in a text, in order."""
        return self._tokens.findall(text)

    def hide(self, text: str) -> str:
        """A text in which each has a mark within, that `TextTokens` takes for no character."""
        return self._tokens.sub(lambda found: found[0][0] + MARK + found[0][1:], text)

    def shown(self, text: str) -> str:
        """A text as it was before `hide`."""
        return self._hidden.sub(lambda found: found[0].replace(MARK, "", 1), text)

    def marks(self, text: str) -> list[int]:
        """Where the marks of `hide` stand in a text."""
        return [found.start() + 1 for found in self._hidden.finditer(text)]


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")
