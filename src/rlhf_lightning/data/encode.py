"""Rows of text to ids: tokenised in chunks, cut to the limits, each cut noted and each drop with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_lightning.chat.encoder import APART, ChatEncoder, Encoded
from rlhf_lightning.chat.messages import Prompt, RefusedTurnsError
from rlhf_lightning.chat.writer import (
    ACTING,
    HIDDEN,
    LEFT_OUT,
    NO_END,
    NO_TURNS,
    NOT_APPLIED,
    REWRITES,
    Dialogue,
    Kind,
)
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.data.collate import EncodedSequence, Ids
from rlhf_lightning.data.limits import TokenLimits, cut_prompt
from rlhf_lightning.data.rows import Row

REFUSED = "the dialogue format refuses the turns"
LONG_PROMPT = "prompt is too long"
SHORT_RESPONSE = "response is too short"
NOTES = {
    NO_TURNS: "dialogues whose earlier turns the template does not show",
    REWRITES: "dialogues in which the chat template does not continue the prompt that generation is given; what both "
    "have in common is the prompt of their responses, and all that follows is taught",
    APART: "responses tokenised apart, since one token would hold the end of their prompt and their beginning",
    NO_END: "dialogues whose chat template writes no token at the end of a turn; the EOS is taught there",
    LEFT_OUT: "dialogues of which the chat template leaves out turns, tools, calls of tools or the thoughts of an "
    "answer",
    NOT_APPLIED: "prompts given as text, to which the tokenizer's chat template is not applied; "
    "`dialogue_format: chat_template` writes each as a turn of the user",
    HIDDEN: "dialogues that hold control tokens in what is said, where they are text and do not act",
    ACTING: "prompts given as text with control tokens in it, which act as written",
}
"""What is counted of rows that are kept, as it is said to users."""
_NO_SPANS = np.zeros(0, dtype=np.int32)
_BODY = "POST:"
"""What opens the text of a forum post, after its subreddit and title, where those are told apart."""


class EncodedRow(NamedTuple):
    """A row as ids, cut to the limits.

    Attributes:
        prompt: ids of the prompt, int32.
        turns: where the assistant spoke earlier in the prompt, int32: first token, token after the last, and so on.
        responses: ids of each response, int32, its end of turn included unless it was cut.
        notes: what the encoder says of it, see `NOTES`.
        cut: `prompt`, and `response` once for each response that was cut.
        whole_lengths: tokens of the prompt and of each response before anything was cut.
        asked: ids of the prompt that generation is given, int32; None where it is `prompt`.
    """

    prompt: np.ndarray
    turns: np.ndarray
    responses: list[np.ndarray]
    notes: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    whole_lengths: tuple[int, ...] = ()
    asked: np.ndarray | None = None


def encode_rows(
    rows: Sequence[Row], chat: ChatEncoder, limits: TokenLimits, need_turns: bool = False
) -> list[EncodedRow | str]:
    """Ids of rows, or the reason one is dropped for. Pure, so any process may do any rows; about 1000 a call.

    The ids of a prompt are those that generation sees, whatever follows; see `ChatEncoder`.

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
    results = chat.encode_dialogues([_dialogue(row, chat) for row in rows], need_turns)
    return [
        f"{REFUSED}: {result.reason}" if isinstance(result, RefusedTurnsError) else _fit(row, result, chat, limits)
        for row, result in zip(rows, results, strict=True)
    ]


class Encoder(NamedTuple):
    """What turns rows into ids; every process has its own copy.

    Attributes:
        chat: the tokenizer and the form of dialogues.
        limits: what to cut to.
        find_turns: look for earlier turns of the assistant in the prompt.
    """

    chat: ChatEncoder
    limits: TokenLimits
    find_turns: bool = False

    def encode(self, rows: list[Row]) -> list[EncodedRow | str]:
        """Ids of each row, or the reason it is dropped for."""
        return encode_rows(rows, self.chat, self.limits, self.find_turns) if rows else []


def whole_prompt(row: Row) -> Prompt:
    """The prompt with its suffix."""
    return row.prompt + row.suffix if isinstance(row.prompt, str) else row.prompt


def written_prompt(row: Row) -> WrittenPrompt:
    """The prompt as the row wrote it, whole."""
    return WrittenPrompt(whole_prompt(row), row.tools)


def _dialogue(row: Row, chat: ChatEncoder) -> Dialogue:
    """A row as it is to be written."""
    prompt, responses = whole_prompt(row), row.responses
    if row.suffix and chat.kind(prompt) == "template":
        # The space after the suffix stands between two texts; an answer in a turn of its own does not begin with it.
        responses = tuple(text.removeprefix(" ") if isinstance(text, str) else text for text in responses)
    return Dialogue(prompt, responses, row.tools, row.untaught)


def _fit(row: Row, whole: Encoded, chat: ChatEncoder, limits: TokenLimits) -> EncodedRow | str:
    """A row cut to the limits, or the reason it is dropped for.

    A response that does not fit loses its end of turn, so it is never taught as complete. All responses of a row stand
    behind the same prompt.
    """
    written, prompt, turns, responses, notes, asked = whole
    if not row.prompt:
        prompt, responses = _whole_text(prompt, *responses)
    whole_lengths = (len(prompt), *map(len, responses))
    cut: tuple[str, ...] = ()
    room = limits.prompt_room(whole_lengths[1:])
    if max(len(prompt), len(asked) if written.asked else 0) > room:
        if limits.long_prompts == "drop":
            return LONG_PROMPT
        prompt, turns = _cut(prompt, turns, written.prompt, row.suffix, room, chat, written.kind)
        asked, _ = _cut(asked, _NO_SPANS, written.asked, row.suffix, room, chat, written.kind)
        if len(prompt) == 0 or (written.asked and len(asked) == 0):
            return LONG_PROMPT
        cut = ("prompt",)
    if any(len(ids) - 1 < limits.minimum_response_length for ids in responses):
        return SHORT_RESPONSE
    left = limits.max_length - len(prompt)
    cut += ("response",) * sum(len(ids) > left for ids in responses)
    return EncodedRow(
        prompt, turns, [ids[:left] for ids in responses], notes, cut, whole_lengths, asked if written.asked else None
    )


def _cut(
    ids: np.ndarray, turns: np.ndarray, text: str, suffix: str, room: int, chat: ChatEncoder, kind: Kind
) -> tuple[np.ndarray, np.ndarray]:
    """A prompt and its turns cut to the room, if that is needed; no ids where nothing before its suffix fits."""
    if len(ids) <= room:
        return ids, turns
    return (
        (cut_post(text, suffix, room, chat, kind), _NO_SPANS)
        if suffix
        else cut_prompt(ids, turns, room, chat.beginning(ids))
    )


def _whole_text(prefix: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """A text that nothing asks for as prompt and response.

    The first token of a sequence is never a target, so it is the prompt: the tokenizer's own beginning, which the text
    may hold already, or the first token of the text.
    """
    begun = len(prefix) if np.array_equal(text[: len(prefix)], prefix) else 0
    whole = np.concatenate([prefix, text[begun:]])
    first = max(1, len(prefix))
    return whole[:first], [whole[first:]]


def cut_post(text: str, suffix: str, room: int, chat: ChatEncoder, kind: Kind) -> np.ndarray:
    """Ids of a prompt that is cut before its suffix, at the last end of a paragraph that fits (Stiennon et al. 2020).

    A post of one long paragraph is cut at white space instead, never in mid-word.

    Args:
        text: the rendered prompt; what follows the last `suffix` is kept too.
        suffix: end of the prompt.
        room: tokens the prompt may have.
        chat: turns text into ids.
        kind: as what the prompt was written.

    Returns:
        Ids, int32; none where nothing of the post fits.
    """
    head, mark, end = text.rpartition(suffix)
    tail = mark + end
    body = head.find(_BODY) + len(_BODY) if _BODY in head else 0
    length = len(chat.text_of_first(head, max(0, room - len(chat.encode_text(tail, kind)))))
    while (length := _break_before(head, body, length)) > body:
        ids = chat.encode_text(head[:length] + tail, kind)
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
    """A sequence to score, with the texts it stands for."""
    texts = chat.decode([prompt, response])
    return EncodedSequence(np.concatenate([prompt, response]), texts[0], texts[1], role, row_id)
