"""Text to ids: dialogues, chat templates, and the one beginning and one end every sequence has.

A prompt and its response are tokenised apart and joined, so the ids of a prompt never depend on what follows and no
token spans the border: what training sees is what generation continues.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError

Message = dict[str, str]
Prompt = str | list[Message]
DialogueFormat = Literal["auto", "chat_template", "plain"]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}


class RefusedTurnsError(UserError):
    """One dialogue that its format cannot express, such as two user turns in a row under a strict chat template."""


class Rendered(NamedTuple):
    """A prompt as text.

    Attributes:
        text: what is tokenised.
        kind: `verbatim`, `plain` (Human/Assistant turns) or `template`; it decides how the response is spaced.
    """

    text: str
    kind: Literal["verbatim", "plain", "template"]


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
    parts = _TURN.split(text.strip())
    speakers, contents = parts[1::2], [content.strip() for content in parts[2::2]]
    if parts[0] or not speakers or speakers[0] != "Human" or speakers[-1] != "Assistant" or contents[-1]:
        return None
    turns = zip(speakers[:-1], contents[:-1], strict=True)
    return [{"role": _ROLES[speaker], "content": content} for speaker, content in turns]


def render_plain(messages: list[Message]) -> str:
    r"""Messages as Human and Assistant turns, system messages first as lines of their own.

    Args:
        messages: roles `system`, `user` and `assistant`.

    Raises:
        RefusedTurnsError: another role.

    Example:
        >>> render_plain([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
        'Be brief.\n\nHuman: hi\n\nAssistant:'
    """
    lines, turns = [], []
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "system":
            lines.append(content)
        elif role in _SPEAKERS:
            turns.append(f"\n\n{_SPEAKERS[role]}: {content}")
        else:
            raise RefusedTurnsError(f"role {role!r} has no place in a plain dialogue; use system, user and assistant")
    return "\n".join(lines) + "".join(turns) + "\n\nAssistant:"


def default_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids a tokenizer puts before a text unasked: its BOS, or nothing."""
    with_special = tokenizer("x").input_ids
    plain = tokenizer("x", add_special_tokens=False).input_ids
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return list(with_special[:start])
    return []


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer a chat template, which it then carries into every folder it is saved to.

    Args:
        tokenizer: changed in place.
        template: path of a Jinja file, or the template itself.

    Raises:
        UserError: no such file.
    """
    if "{" not in template:
        path = Path(template).expanduser()
        if not path.is_file():
            raise UserError(f"chat_template: {template} does not exist; give a Jinja file or the template itself")
        template = path.read_text(encoding="utf-8")
    tokenizer.chat_template = template


class ChatEncoder:
    """Turns prompts and responses into the ids a model sees.

    Text is a prompt as it stands, except where it is a dialogue in Human and Assistant turns; dialogues and lists of
    messages go through the tokenizer's chat template if it has one.

    Args:
        tokenizer: used as it is; no token is added to it.
        dialogue_format: `auto` as said above, except that messages need a template; `plain` writes every dialogue as
            Human and Assistant turns; `chat_template` sends every prompt through the template, a plain text as one
            user turn.
        chat_template: path or text of a Jinja template to set on the tokenizer.

    Raises:
        UserError: a bad template, or `chat_template` asked of a tokenizer that has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dialogue_format: DialogueFormat = "auto",
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.dialogue_format = dialogue_format
        if chat_template is not None:
            set_chat_template(tokenizer, chat_template)
        if dialogue_format == "chat_template" and not tokenizer.chat_template:
            raise self._no_template()
        self.prefix = default_prefix(tokenizer)

    def render(self, prompt: Prompt) -> Rendered:
        """A prompt as the text that is tokenised, ready for the response to follow.

        Raises:
            UserError: messages without a template.
            RefusedTurnsError: a role or an order of turns that the format refuses.
        """
        if isinstance(prompt, str):
            messages = parse_dialogue(prompt)
            if messages is None and self.dialogue_format != "chat_template":
                return Rendered(prompt, "verbatim")
            if self._uses_template:
                turns = [{"role": "user", "content": prompt}] if messages is None else _merge_turns(messages)
                return Rendered(self._apply_template(turns), "template")
            return Rendered(render_plain(messages or []), "plain")
        if self._uses_template:
            return Rendered(self._apply_template(prompt), "template")
        if self.dialogue_format == "auto":
            raise self._no_template()
        return Rendered(render_plain(prompt), "plain")

    def response_text(self, response: str, kind: str) -> str:
        """A response spaced as its prompt asks: one leading space after `Assistant:`, stripped after a template."""
        if kind == "plain":
            return " " + response.lstrip()
        return response.strip() if kind == "template" else response

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered prompts, each with the tokenizer's own beginning exactly once.

        Args:
            texts: from `render`.
        """
        n = len(self.prefix)
        return [ids if ids[:n] == self.prefix else self.prefix + ids for ids in self._ids(texts)]

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        """Ids of response texts, each with the EOS at its end exactly once.

        Args:
            texts: from `response_text`.

        Raises:
            UserError: the tokenizer has no EOS token.
        """
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"tokenizer {self._name} has no EOS token, so no response could ever end; set `eos_token`")
        sequences = self._ids(texts)
        for ids in sequences:
            while ids and ids[-1] == eos:
                ids.pop()
            ids.append(eos)
        return sequences

    def encode_prompt(self, prompt: Prompt) -> tuple[str, list[int]]:
        """Text and ids of one prompt."""
        text = self.render(prompt).text
        return text, self.encode_prompts([text])[0]

    def encode_response(self, prompt: Prompt, response: str) -> list[int]:
        """Ids of one response, to be joined to those of its prompt."""
        return self.encode_responses([self.response_text(response, self.render(prompt).kind)])[0]

    def decode(self, sequences: list[list[int]]) -> list[str]:
        """Texts of id sequences, without special tokens."""
        return [
            str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in sequences
        ]

    @property
    def _uses_template(self) -> bool:
        return self.dialogue_format != "plain" and bool(self.tokenizer.chat_template)

    @property
    def _name(self) -> str:
        return self.tokenizer.name_or_path or type(self.tokenizer).__name__

    def _no_template(self) -> UserError:
        return UserError(
            f"tokenizer {self._name} has no chat template; pass `chat_template: path/to/template.jinja` "
            "or `dialogue_format: plain`"
        )

    def _apply_template(self, messages: list[Message]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RefusedTurnsError(f"the chat template refuses the turns {roles}: {error}") from error

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: lengths beyond the model's are ours to cut, no cause for a warning here.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def _merge_turns(messages: list[Message]) -> list[Message]:
    """Join neighbouring turns of one speaker, which many templates refuse."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            joined = f"{merged[-1]['content']}\n\n{message['content']}"
            merged[-1] = {"role": message["role"], "content": joined}
        else:
            merged.append(message)
    return merged
