"""A prompt as its row wrote it: kept beside its ids, for those who read it by another template or as plain text."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from rlhf_lightning.chat.messages import Message, Prompt
from rlhf_lightning.chat.plain import parse_dialogue

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


class WrittenPrompt(NamedTuple):
    """A prompt before it is rendered or cut.

    Attributes:
        prompt: text, or messages.
        tools: that the assistant may call, as chat templates read them.
    """

    prompt: Prompt
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def messages(self) -> list[Message]:
        r"""The prompt as messages; text that is no dialogue is one turn of the user.

        Example:
            >>> WrittenPrompt("\n\nHuman: hi\n\nAssistant:").messages
            [{'role': 'user', 'content': 'hi'}]
        """
        if not isinstance(self.prompt, str):
            return self.prompt
        return parse_dialogue(self.prompt) or [{"role": "user", "content": self.prompt}]

    @property
    def text(self) -> str:
        r"""The prompt for people: the content of a single turn of the user, more turns with their speakers.

        Text is the same whether its row wrote a dialogue as text or as messages, and text that is no dialogue stays as
        it is. Calls of tools are written as JSON.

        Example:
            >>> WrittenPrompt([{"role": "user", "content": "hi"}]).text
            'hi'
            >>> WrittenPrompt("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:").text
            'Human: hi\n\nAssistant: hello\n\nHuman: bye'
        """
        messages = self.messages
        if len(messages) == 1 and messages[0]["role"] == "user":
            return str(messages[0]["content"])
        return "\n\n".join(f"{_SPEAKERS.get(m['role'], m['role'].capitalize())}: {_said(m)}" for m in messages)

    @property
    def continues(self) -> bool:
        """Whether it is text that is no dialogue, whose response goes on where it ends."""
        return isinstance(self.prompt, str) and parse_dialogue(self.prompt) is None


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    parts = [str(message.get("content") or ""), json.dumps(calls, ensure_ascii=False) if calls else ""]
    return "\n".join(part for part in parts if part)


def to_json(written: WrittenPrompt | None) -> str | None:
    """A written prompt as one line of JSON, for a file."""
    return None if written is None else json.dumps(written, ensure_ascii=False)


def from_json(line: str | None) -> WrittenPrompt | None:
    """The written prompt that `to_json` made the line of."""
    if line is None:
        return None
    prompt, tools = json.loads(line)
    return WrittenPrompt(prompt, tuple(tools))
