"""A reward model's scores along a response, at all tokens or at the ends of steps.

Notation: B responses, R padded response length.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.text_so_far import TextSoFar, text_by
from rlhf_lightning.errors import UserError
from rlhf_lightning.functional.masked import last_index
from rlhf_lightning.functional.token_rewards import PerToken, rewards_along
from rlhf_lightning.host import on_host


@dataclass
class TokenRewards:
    """How the scores of a reward model become rewards of tokens.

    Attributes:
        kind: as in `functional.rewards_along`.
        step_end: text at whose ends they are given, and at the last token; None for every token.
        tokenizer: the policy's, which tells where a text ends.
        found: how many ends of steps responses have held so far.
    """

    kind: PerToken
    step_end: str | None
    tokenizer: PreTrainedTokenizerBase
    found: int = field(default=0, init=False)

    def of(self, scores: Tensor, response_ids: Tensor, response_mask: Tensor) -> Tensor:
        """Rewards of tokens, `[B, R]`.

        Args:
            scores: of each response up to and with each token, `[B, R]`.
            response_ids: `[B, R]`, int64.
            response_mask: True for response tokens, `[B, R]`, bool.
        """
        places = response_mask
        if self.step_end is not None:
            ids, mask = on_host(response_ids, response_mask)
            ends = torch.zeros_like(mask)
            ends[torch.arange(len(mask)), last_index(mask)] = True
            for row, (said, real) in enumerate(zip(ids, mask, strict=True)):
                steps = step_ends(self.tokenizer, said[real].tolist(), self.step_end)
                self.found += len(steps)
                ends[row, steps] = True
            places = places & ends.to(places.device)
        return rewards_along(scores, places, self.kind)


def step_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], step_end: str) -> list[int]:
    """The tokens that complete a text, each time that it stands in a response.

    Args:
        tokenizer: of the ids.
        ids: of the response, without padding.
        step_end: the text; it may begin within a token, and end within one. Or a special token, which has no text.
    """
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    if step_end in special:
        return [place for place, number in enumerate(ids) if number == special[step_end]]
    reader = TextSoFar(tokenizer)
    text, found, start, last = reader.read(ids, complete=True), [], 0, 0

    def settled(count: int) -> int:
        return len(reader.read(ids[:count]))

    while (at := text.find(step_end, start)) >= 0:
        start = at + len(step_end)
        # A text is the beginning of every later one, so its length grows with the tokens.
        latest = bisect_left(range(1, len(ids)), start, lo=last, key=settled)
        # Tokens before it may complete the text as well, but be held back, since others could follow.
        if latest > last:
            last = bisect_left(range(1, latest), settled(latest), lo=last, key=settled)
        while last < latest and len(text_by(tokenizer, ids[: last + 1], text)) < start:
            last += 1
        found.append(last)
    return found


def check_per_token(per_token: PerToken | None, step_end: str | None, prefix: str) -> None:
    """Refuse ends of steps that nothing asks for.

    Args:
        per_token: the kind of rewards of tokens, if any.
        step_end: the text.
        prefix: stands before both names.

    Raises:
        UserError: says what to do.
    """
    if step_end is not None and (per_token is None or not step_end):
        raise UserError(
            f"{prefix}step_end ({step_end!r}) says where {prefix}per_token gives rewards: set that, and a text that is "
            "not empty, or leave it out"
        )
    if step_end is not None and re.search(r"\\n(?![a-z])", step_end):  # \neq and its like are LaTeX
        raise UserError(
            f'{prefix}step_end holds a backslash and an n in place of a line end: write "\\n\\n" in double quotes in '
            "YAML, and $'\\n\\n' in the shell"
        )
