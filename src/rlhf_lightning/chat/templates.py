"""Chat templates: what they write, found by letting them write, and which tokens end a turn in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jinja2
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.control_tokens import ControlTokens, is_thought
from rlhf_lightning.chat.messages import Message, RefusedTurnsError
from rlhf_lightning.errors import UserError

# Words that no template writes, one token more or less: only where they stand matters.
_ASK, _ANSWER, _MORE, _TOOL = "Qzask", "Qzanswer", "Qzmore", "Qztool"


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


class Tail(NamedTuple):
    """What a template writes after the words of an answer.

    Attributes:
        text: all of it.
        end: the token that ends the turn; "" where the template writes none.
        length: characters of the text up to and with that token; where there is none, without the white space that
            ends the text.
    """

    text: str
    end: str
    length: int


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: carries one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def write(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), answer: bool = True) -> str:
        """Messages as text, ready for an answer or as they would end the dialogue.

        Args:
            messages: in order.
            tools: that the assistant may call.
            answer: write what an answer begins with.

        Raises:
            RefusedTurnsError: the template has no place for them.
        """
        try:
            written = self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=answer
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RefusedTurnsError(f"the chat template refuses the turns {roles}: {error}", str(error)) from error
        return str(written)

    @cached_property
    def last(self) -> Tail:
        """What follows the answer that ends a dialogue.

        Of several control tokens in a row (one that closes the answer, one that closes the turn) the EOS ends the turn,
        or else the last.
        """
        _, answered, text = self._try([_assistant(_ANSWER)]).rpartition(_ANSWER)
        if not answered:
            return Tail("", "", 0)
        place, end = 0, ""
        while (found := self._added.first(text[place:])) and not (end and found.start()):
            place, end = place + found.end(), found[0]
            if end == self.tokenizer.eos_token:
                break
        return Tail(text, end, place or len(text.rstrip()))

    @cached_property
    def leaves_answers_out(self) -> bool:
        """Whether the assistant's words are not written at all, as where a template wants them in parts."""
        text = self._try([_assistant(_ANSWER)])
        return bool(text) and _ANSWER not in text

    @cached_property
    def middle_end(self) -> str:
        """The token that ends an answer to which the user replies; "" where none does."""
        text = self._try([_assistant(_ANSWER), _user(_MORE)]).rpartition(_ANSWER)[2].partition(_MORE)[0]
        if not self.last.end or self.last.end in text:
            return self.last.end
        return next(iter(self._added.all(text)), "")

    @cached_property
    def ends(self) -> list[str]:
        """The tokens that end the last turn of a dialogue: of an answer, and of a call of a tool; perhaps none."""
        found = [self.last.end, self._end_of_call]
        return [end for end in dict.fromkeys(found) if end]

    @cached_property
    def written(self) -> frozenset[str]:
        """The added tokens that the template writes of its own accord, those around thoughts left out."""
        texts = [self._try([_assistant(_ANSWER), _user(_MORE)], answer=True), self._try([_assistant(_ANSWER)])]
        found = {token for text in texts for token in self._added.all(text)}
        return frozenset({*found, *self.ends})

    @cached_property
    def anchor(self) -> str:
        """The last added token before an answer that is about to begin, "" where there is none."""
        return next(reversed(self._added.all(self._try([], answer=True))), "")

    def writes_answer_apart(self, prompt: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """A dialogue with an answer that no other answer begins like, as text."""
        return self.write([*prompt, _assistant(_ANSWER)], tools, answer=False)

    @cached_property
    def _added(self) -> ControlTokens:
        tokens = {*self.tokenizer.get_added_vocab(), *map(str, self.tokenizer.all_special_tokens)}
        return ControlTokens(token for token in tokens if not is_thought(token))

    @cached_property
    def _end_of_call(self) -> str:
        for arguments in ("{}", dict[str, str]()):
            call = {"id": "call00000", "type": "function", "function": {"name": _TOOL, "arguments": arguments}}
            text = self._try([{**_assistant(""), "tool_calls": [call]}])
            if self.last.end and _TOOL in text and (tokens := self._added.all(text.rpartition(_TOOL)[2])):
                return tokens[-1]
        return ""

    def _try(self, turns: list[Message], answer: bool = False) -> str:
        """A dialogue of a question and these turns as text, "" where the template refuses it."""
        for opening in ([], [{"role": "system", "content": _MORE}]):
            try:
                return self.write([*opening, _user(_ASK), *turns], answer=answer)
            except RefusedTurnsError:
                continue
        return ""


_ENDS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, list[int]]] = WeakKeyDictionary()


def turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end the assistant's turn in a tokenizer's chat template; none without a template.

    Args:
        tokenizer: as generation and export use it, with the template that the data were written by.
    """
    template = str(tokenizer.chat_template or "")
    if not template:
        return []
    known = _ENDS.get(tokenizer)
    if known is None or known[0] != template:
        ends = [tokenizer.get_vocab()[end] for end in ChatTemplate(tokenizer).ends]
        known = _ENDS[tokenizer] = template, ends
    return list(known[1])


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
