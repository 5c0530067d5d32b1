"""What a dialogue is: messages in order, and the response to learn."""

from __future__ import annotations

import json
from typing import Any

from rlhf_lightning.errors import UserError

Message = dict[str, Any]
"""`role` and `content` (text, "" where there is none beside `tool_calls`), and optionally `reasoning_content`,
`tool_calls`, `tool_call_id` and `name`, as chat templates read them."""
Prompt = str | list[Message]
Response = str | Message
"""Text, or a message of the assistant where there is more to it than text."""

Spans = list[tuple[int, int]]
"""Parts of a text, each from its first character to the one after its last."""


class RefusedTurnsError(UserError):
    """One dialogue that its format cannot express, such as two user turns in a row under a strict chat template.

    Args:
        message: what is wrong.
        reason: the same in few words, under which such dialogues are counted.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = " ".join((reason or message).split())[:100]


def exact_text(said: Prompt | Response) -> str:
    """Text by which prompts or responses are equal where they say exactly the same."""
    return said if isinstance(said, str) else json.dumps(said)


def merge_turns(messages: list[Message]) -> list[Message]:
    """Join neighbouring turns of one speaker, which many templates refuse."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            joined = f"{merged[-1]['content']}\n\n{message['content']}"
            merged[-1] = {"role": message["role"], "content": joined}
        else:
            merged.append(message)
    return merged
