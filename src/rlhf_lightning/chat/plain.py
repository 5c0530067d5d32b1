"""Dialogues as text: turns of Human and Assistant read, and messages written in a plain format."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_lightning.chat.messages import Message, RefusedTurnsError, Spans

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PlainFormat:
    """How a dialogue is written without a chat template. All turns stand in a row; system messages come first.

    Args:
        user: written before each turn of the user.
        assistant: written before each turn of the assistant, and at the end of the prompt. A space belongs into
            `response` instead: many tokenizers make one token of it and the word that follows.
        system: written before each system message.
        response: stands between `assistant` and what the assistant says.
        turn_end: written after each earlier turn of the assistant; the tokenizer's EOS text here gives these turns the
            end that the last response has anyway.
    """

    user: str = "\n\nHuman: "
    assistant: str = "\n\nAssistant:"
    system: str = ""
    response: str = " "
    turn_end: str = ""


HUMAN_ASSISTANT = PlainFormat()


def parse_dialogue(text: str) -> list[Message] | None:
    r"""The messages of a prompt written as Human and Assistant turns, or None if it is not written so.

    Args:
        text: begins with a `Human:` turn and ends with `Assistant:` waiting for its answer.

    Example:
        >>> parse_dialogue("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:")[-1]
        {'role': 'user', 'content': 'bye'}
        >>> parse_dialogue("Once upon a time") is None
        True
    """
    parts = _TURN.split(f"\n\n{text.strip()}")  # searching for ^ too would take ten times as long
    speakers, contents = parts[1::2], [content.strip() for content in parts[2::2]]
    if parts[0] or not speakers or speakers[0] != "Human" or speakers[-1] != "Assistant" or contents[-1]:
        return None
    turns = zip(speakers[:-1], contents[:-1], strict=True)
    return [{"role": _ROLES[speaker], "content": content} for speaker, content in turns]


def render_plain(messages: list[Message], plain: PlainFormat = HUMAN_ASSISTANT) -> tuple[str, Spans]:
    r"""Messages as turns in a plain format, and where the assistant speaks in them.

    Args:
        messages: roles `system`, `user` and `assistant`.
        plain: what stands before and after each.

    Raises:
        RefusedTurnsError: another role.

    Example:
        >>> render_plain([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}])
        ('\n\nHuman: hi\n\nAssistant: hello\n\nAssistant:', [(23, 29)])
    """
    text = "\n".join(plain.system + m["content"].strip() for m in messages if m["role"] == "system")
    spans = []
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "user":
            text += plain.user + content
        elif role == "assistant":
            text += plain.assistant
            turn = plain.response + content + plain.turn_end
            spans.append((len(text), len(text) + len(turn)))
            text += turn
        elif role != "system":
            raise RefusedTurnsError(
                f"role {role!r} has no place in a plain dialogue; use system, user and assistant", f"role {role!r}"
            )
    return text + plain.assistant, spans
