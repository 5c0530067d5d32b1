"""Rows of text to ids: tokenised in chunks, cut to the limits, each cut noted and each drop with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_lightning.chat.encoder import ChatEncoder, Rendered
from rlhf_lightning.chat.messages import Prompt, RefusedTurnsError
from rlhf_lightning.data.collate import EncodedSequence, Ids
from rlhf_lightning.data.limits import TokenLimits, cut_prompt
from rlhf_lightning.data.rows import Row

REFUSED = "the dialogue format refuses the turns"
LONG_PROMPT = "prompt is too long"
SHORT_RESPONSE = "response is too short"
CUT_PROMPT = "cut: prompt"
CUT_RESPONSE = "cut: response"
NO_TURNS = "turns not found"
_NO_SPANS = np.zeros(0, dtype=np.int32)
_BODY = "POST:"
"""What opens the text of a forum post, after its subreddit and title, where those are told apart."""


class EncodedRow(NamedTuple):
    """A row as ids, cut to the limits.

    Attributes:
        prompt: ids of the prompt, int32.
        turns: where the assistant spoke earlier in the prompt, int32: first token, token after the last, and so on.
        responses: ids of each response, int32, its EOS included unless it was cut.
        notes: `cut: prompt`, `cut: response` once for each response that was cut, `turns not found`.
    """

    prompt: np.ndarray
    turns: np.ndarray
    responses: list[np.ndarray]
    notes: tuple[str, ...] = ()


def encode_rows(
    rows: Sequence[Row], chat: ChatEncoder, limits: TokenLimits, need_turns: bool = False
) -> list[EncodedRow | str]:
    """Ids of rows, or the reason one is dropped for. Pure, so any process may do any rows; about 1000 a call.

    Prompt and response are tokenised apart, so the ids of a prompt are those that generation sees, whatever follows.

    Args:
        rows: with any number of responses, none included.
        chat: turns text into ids.
        limits: what to cut to and what to drop.
        need_turns: find the earlier turns of the assistant too; it costs a little, and takes a fast tokenizer.

    Returns:
        One for each row, in order.

    Raises:
        UserError: something that is wrong with all rows alike, such as messages without a chat template.
    """
    rendered = [_render(row, chat) for row in rows]
    kept = [(row, text) for row, text in zip(rows, rendered, strict=True) if text is not None]
    prompts = _encode_prompts(kept, chat, need_turns)
    texts = [chat.response_text(response, text.kind) for row, text in kept for response in row.responses]
    responses = iter(chat.encode_responses(texts)) if texts else iter(())
    whole = (
        (row, text, prompt._replace(responses=[next(responses) for _ in row.responses]))
        for (row, text), prompt in zip(kept, prompts, strict=True)
    )
    return [REFUSED if text is None else _fit(*next(whole), chat, limits) for text in rendered]


def _render(row: Row, chat: ChatEncoder) -> Rendered | None:
    """The prompt as text; None where the format refuses its turns."""
    if not row.prompt:
        return Rendered("", "verbatim")
    try:
        return chat.render(_whole_prompt(row))
    except RefusedTurnsError:
        return None


def _whole_prompt(row: Row) -> Prompt:
    return row.prompt + row.suffix if isinstance(row.prompt, str) else row.prompt


def _encode_prompts(kept: list[tuple[Row, Rendered]], chat: ChatEncoder, need_turns: bool) -> list[EncodedRow]:
    """The rows with their prompts and turns, but without responses."""
    texts = [text.text for _, text in kept]
    if not need_turns:
        return [EncodedRow(ids, _NO_SPANS, []) for ids in chat.encode_prompts(texts)]
    spans = [chat.turns(_whole_prompt(row), text.text) for row, text in kept]
    prompts, turns = chat.encode_turns(texts, [found or [] for found in spans])
    notes = [(NO_TURNS,) if found is None else () for found in spans]
    return [EncodedRow(ids, places, [], note) for ids, places, note in zip(prompts, turns, notes, strict=True)]


def _fit(row: Row, text: Rendered, whole: EncodedRow, chat: ChatEncoder, limits: TokenLimits) -> EncodedRow | str:
    """A row cut to the limits, or the reason it is dropped for.

    A response that does not fit loses its end, and with it its EOS, so it is never taught as complete. All responses of
    a row stand behind the same prompt.
    """
    prompt, turns, responses, notes = whole
    if not row.prompt:
        prompt, responses = _whole_text(prompt, *responses)
    room = limits.prompt_room([len(ids) for ids in responses])
    if len(prompt) > room:
        if limits.long_prompts == "drop":
            return LONG_PROMPT
        if row.suffix:
            prompt, turns = cut_post(text.text, row.suffix, room, chat), _NO_SPANS
            if len(prompt) == 0:
                return LONG_PROMPT
        else:
            prompt, turns = cut_prompt(prompt, turns, room, chat.prefix)
        notes += (CUT_PROMPT,)
    if any(len(ids) - 1 < limits.minimum_response_length for ids in responses):
        return SHORT_RESPONSE
    left = limits.max_length - len(prompt)
    notes += (CUT_RESPONSE,) * sum(len(ids) > left for ids in responses)
    return EncodedRow(prompt, turns, [ids[:left] for ids in responses], notes)


def _whole_text(prefix: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """A text that nothing asks for as prompt and response.

    The first token of a sequence is never a target, so it is the prompt: the tokenizer's own beginning, which the text
    may hold already, or the first token of the text.
    """
    begun = len(prefix) if np.array_equal(text[: len(prefix)], prefix) else 0
    whole = np.concatenate([prefix, text[begun:]])
    first = max(1, len(prefix))
    return whole[:first], [whole[first:]]


def cut_post(text: str, suffix: str, room: int, chat: ChatEncoder) -> np.ndarray:
    """Ids of a prompt that is cut before its suffix, at the last end of a paragraph that fits (Stiennon et al. 2020).

    A post of one long paragraph is cut at white space instead, never in mid-word.

    Args:
        text: the rendered prompt; what follows the last `suffix` is kept too.
        suffix: end of the prompt.
        room: tokens the prompt may have.
        chat: turns text into ids.

    Returns:
        Ids, int32; none where nothing of the post fits.
    """
    head, mark, end = text.rpartition(suffix)
    tail = mark + end
    body = head.find(_BODY) + len(_BODY) if _BODY in head else 0
    length = len(chat.text_of_first(head, max(0, room - len(chat.encode_prompts([tail])[0]))))
    while (length := _break_before(head, body, length)) > body:
        ids = chat.encode_prompts([head[:length] + tail])[0]
        if len(ids) <= room:
            return ids
        # The first guess may be too long by a few tokens, and a token has a character at the least.
        length = max(0, length - (len(ids) - room))
    return _NO_SPANS


def _break_before(text: str, start: int, end: int) -> int:
    """Where the text up to `end` ends its last paragraph after `start`, or else its last word; -1 if nowhere."""
    end += len(text[end:]) - len(text[end:].lstrip())  # white space is not kept, so it need not fit
    for marks in ("\n", " \t\n"):
        place = max(text.rfind(mark, start, end) for mark in marks)
        if text[start : max(start, place)].strip():
            return len(text[:place].rstrip())
    return -1


def scored_sequence(prompt: Ids, response: Ids, role: str, row_id: int, chat: ChatEncoder) -> EncodedSequence:
    """A sequence to score, with the texts it stands for.

    Args:
        prompt: ids.
        response: ids.
        role: the column the response came from.
        row_id: of the row.
        chat: turns ids back into text.
    """
    texts = chat.decode([prompt, response])
    return EncodedSequence(np.concatenate([prompt, response]), texts[0], texts[1], role, row_id)
