"""Dialogues as the texts that are tokenised: prompt, and each response as what follows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.control_tokens import MARK, ControlTokens
from rlhf_lightning.chat.messages import Message, Prompt, RefusedTurnsError, Response, Spans, merge_turns
from rlhf_lightning.chat.plain import PlainFormat, parse_dialogue, render_plain
from rlhf_lightning.chat.templates import ChatTemplate
from rlhf_lightning.chat.tokenization import TextTokens, shared_start
from rlhf_lightning.errors import UserError

DialogueFormat = Literal["auto", "chat_template", "plain"]
Kind = Literal["verbatim", "plain", "template"]

NO_TURNS = "turns not found"
REWRITES = "template does not continue its prompt"
NO_END = "template writes no end of turn"
LEFT_OUT = "template leaves something out"
NOT_APPLIED = "chat template not applied"
HIDDEN = "control tokens in text"
ACTING = "control tokens as written"
_THINK = re.compile("</?think>")


class Dialogue(NamedTuple):
    """A prompt with the responses to it.

    Attributes:
        prompt: text, or messages.
        responses: any number.
        tools: that the assistant may call.
        untaught: which messages of the prompt are the assistant's but not to be taught.
    """

    prompt: Prompt
    responses: Sequence[Response] = ()
    tools: Sequence[dict[str, Any]] = ()
    untaught: Sequence[int] = ()


class Written(NamedTuple):
    """A dialogue as texts; control tokens that it holds without meaning them are hidden, see `ControlTokens`.

    Attributes:
        kind: `verbatim`, `plain` (Human/Assistant turns) or `template`.
        prompt: ready for a response to follow.
        answers: of a template, the whole dialogue with each response, to the end of its turn; else what follows the
            prompt.
        ended: of each, whether the end of its turn is written; the EOS is to follow where it is not.
        common: characters that prompt and answers of a template begin with alike: all of the prompt's, unless the
            template does not continue it.
        spans: where the assistant spoke earlier; None where that cannot be found.
        notes: what is to be counted.
        asked: the prompt that generation is given, where the answers do not continue it.
    """

    kind: Kind
    prompt: str
    answers: list[str]
    ended: list[bool]
    common: int
    spans: Spans | None = None
    notes: tuple[str, ...] = ()
    asked: str = ""


class DialogueWriter:
    """Writes dialogues as their format says.

    Args:
        tokenizer: carries the template.
        dialogue_format: see `ChatEncoder`.
        plain_format: how dialogues are written that go through no template.

    Raises:
        UserError: `chat_template` asked of a tokenizer that has none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, dialogue_format: DialogueFormat, plain_format: PlainFormat
    ) -> None:
        self.tokenizer, self.dialogue_format, self.plain_format = tokenizer, dialogue_format, plain_format
        self.template: ChatTemplate | None = None
        if dialogue_format == "chat_template" and not tokenizer.chat_template:
            raise self._no_template()
        if dialogue_format != "plain" and tokenizer.chat_template:
            self.template = ChatTemplate(tokenizer)
        self.tokens = TextTokens(tokenizer, self.template.written if self.template else ())
        ends = [tokenizer.eos_token, *(self.template.ends if self.template else ())]
        self._ends = tuple(str(end) for end in ends if end)

    def write(self, dialogue: Dialogue, need_turns: bool = False) -> Written:
        """A dialogue as texts.

        Args:
            dialogue: with any number of responses.
            need_turns: find where the assistant spoke earlier.

        Raises:
            UserError: messages without a template.
            RefusedTurnsError: turns that the format refuses.
        """
        kind, messages = self.form(dialogue.prompt)
        if kind == "verbatim":
            return self._verbatim(str(dialogue.prompt), dialogue.responses)
        if kind == "plain":
            return self._plain(messages, dialogue, need_turns)
        assert self.template is not None
        return self._templated(self.template, messages, dialogue, need_turns)

    def form(self, prompt: Prompt) -> tuple[Kind, list[Message]]:
        """As what a prompt is written, and its messages; none for text that is taken as it stands.

        No prompt at all belongs to a whole text, which is no turn of anybody.
        """
        if not isinstance(prompt, str):
            if self.dialogue_format == "auto" and self.template is None:
                raise self._no_template()
            return ("plain" if self.template is None else "template"), prompt
        messages = parse_dialogue(prompt)
        if messages is None:
            if self.dialogue_format != "chat_template" or not prompt:
                return "verbatim", []
            return "template", [{"role": "user", "content": prompt}]
        return ("plain", messages) if self.template is None else ("template", merge_turns(messages))

    def _no_template(self) -> UserError:
        return UserError(
            f"tokenizer {name_of(self.tokenizer)} has no chat template; pass `chat_template: path/to/template.jinja` "
            "or `dialogue_format: plain`"
        )

    # Without a template

    def _verbatim(self, prompt: str, responses: Sequence[Response]) -> Written:
        """Text as it stands. One written with control tokens is meant so, and then they act in its responses too."""
        texts = [content_of(response) for response in responses]
        answers = [self._endless(text) for text in texts]
        written = (prompt or "".join(answers)).removeprefix(str(self.tokenizer.bos_token or ""))
        if self.tokens.control.within(written):
            ends = [self._first_end(text[len(answer) :]) for text, answer in zip(texts, answers, strict=True)]
            answers = [answer + end for answer, end in zip(answers, ends, strict=True)]
            return Written("verbatim", prompt, answers, [bool(end) for end in ends], len(prompt), [], (ACTING,))
        answers = [self._hidden(answer) for answer in answers] if prompt else answers
        notes = (NOT_APPLIED,) if prompt and self.template is not None else ()
        return Written("verbatim", prompt, answers, [False] * len(answers), len(prompt), [], notes + _hiding(answers))

    def _plain(self, messages: list[Message], dialogue: Dialogue, need_turns: bool) -> Written:
        said = [*messages, *(response for response in dialogue.responses if not isinstance(response, str))]
        extras = [name for name in ("tool_calls", "reasoning_content") if any(message.get(name) for message in said)]
        if extras := [*extras, *(["tools"] if dialogue.tools else [])]:
            named = " and ".join(extras)
            raise RefusedTurnsError(f"a plain dialogue has no place for {named}; use a chat template", named)
        messages = [self._safe(message) for message in messages]
        text, spans = render_plain(messages, self.plain_format)
        speakers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        taught = [
            _to_end(text[:end], start, self.tokenizer.eos_token)
            for i, (start, end) in zip(speakers, spans, strict=True)
            if need_turns and i not in dialogue.untaught
        ]
        answers = [
            self.plain_format.response + self._hidden(self._endless(content_of(response))).lstrip()
            for response in dialogue.responses
        ]
        ended = [False] * len(answers)
        return Written("plain", text, answers, ended, len(text), taught, _hiding([text, *answers]))

    def _hidden(self, text: str) -> str:
        return self.tokens.control.hide(text)

    def _endless(self, text: str) -> str:
        """A response without ends of turn of its own at its end; the one that is taught is added."""
        while self._ends and text.endswith(self._ends):
            text = text.removesuffix(next(end for end in self._ends if text.endswith(end)))
        return text

    def _first_end(self, text: str) -> str:
        return next((end for end in self._ends if text.startswith(end)), "")

    # With a template

    def _templated(
        self, template: ChatTemplate, messages: list[Message], dialogue: Dialogue, need_turns: bool
    ) -> Written:
        # The turns of a dialogue that is text are stripped, and so is its answer; other text is one turn as it stands.
        as_text = isinstance(dialogue.prompt, str) and messages[0]["content"] != dialogue.prompt
        messages = [self._safe(message) for message in messages]
        tools = [_everywhere(tool, self.tokens.control) for tool in dialogue.tools]
        text = template.write(messages, tools)
        if dialogue.responses and template.leaves_answers_out:
            raise RefusedTurnsError("the chat template leaves the answer out")
        replies = [self._reply(response, as_text) for response in dialogue.responses]
        wholes = [template.write([*messages, reply], tools, answer=False) for reply in replies]
        notes = _hiding([text, *wholes])
        spans: Spans | None = self._turns(template, messages, tools, text, dialogue.untaught) if need_turns else []
        common, asked = len(text), ""
        if not all(whole.startswith(text) for whole in wholes):
            notes, asked = (*notes, REWRITES), text
            first = template.write(messages, tools, answer=False)
            if shared_start([text, first, *wholes]) < len(first):
                # Even the turns before the answer are written anew for it, so the text ends where answers differ.
                text, spans = template.writes_answer_apart(messages, tools), None if spans else spans
            common = shared_start([text, *wholes])
            if not text[:common].strip():
                raise RefusedTurnsError("the chat template writes nothing of the prompt before the answer")
        ended, answers = [], []
        for whole, reply in zip(wholes, replies, strict=True):
            end = _end_of(template, whole, common)
            answers.append(whole[: end.place])
            ended.append(end.written)
            says = reply["content"].strip() or reply.get("tool_calls")
            if says and end.place - (end.written and len(end.token)) <= common:
                raise RefusedTurnsError("the chat template leaves the answer out")
        if _leaves_out([text, *wholes], tools, messages, replies):
            notes += (LEFT_OUT,)
        notes += (NO_END,) * (not all(ended)) + (NO_TURNS,) * (spans is None)
        return Written("template", text, answers, ended, common, spans, notes, asked)

    def _reply(self, response: Response, strip: bool) -> Message:
        """The message that a response is."""
        message = {"role": "assistant", "content": response} if isinstance(response, str) else dict(response)
        content = self._endless(message["content"])
        return self._safe({**message, "content": content.strip() if strip else content})

    def _safe(self, message: Message) -> Message:
        """A message whose control tokens are hidden."""
        control = self.tokens.control_of_answers if message["role"] == "assistant" else self.tokens.control
        return {name: value if name == "role" else _everywhere(value, control) for name, value in message.items()}

    def _turns(
        self,
        template: ChatTemplate,
        messages: list[Message],
        tools: Sequence[dict[str, Any]],
        text: str,
        untaught: Sequence[int],
    ) -> Spans | None:
        """Where the assistant speaks in a prompt: each turn after its header, to its end of turn.

        That end is left out where it is none that the last turn could have, so none that generation would stop at.
        """
        spans: Spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i in untaught:
                continue
            start = self._start(template, messages[:i], tools, text)
            if start is None:
                return None
            said = message["content"].strip()
            place = text.find(said, start) if said else -1
            after = start if place < 0 else place + len(said)
            end = template.middle_end
            if not end:
                if place < 0:
                    return None
                in_words = template.last.text[: template.last.length]  # an end that is no token
                spans.append((start, after + len(in_words) * text.startswith(in_words, after)))
                continue
            after = text.find(end, after)
            if after < 0:
                return None
            if message.get("tool_calls") and not text[start:after].strip():
                continue  # the template leaves the call out, and silence in its place is not to be taught
            spans.append((start, after + len(end) * (end in self._ends)))
        return spans

    def _start(
        self, template: ChatTemplate, before: list[Message], tools: Sequence[dict[str, Any]], text: str
    ) -> int | None:
        """Where an earlier turn begins behind its header; None where what precedes is now written otherwise."""
        if not before:
            return None
        try:
            header = template.write(before, tools)
            if text.startswith(header):
                return len(header)
            first = template.write(before, tools, answer=False)
            other = template.writes_answer_apart(before, tools)  # else the turn's own beginning may be taken for shared
        except RefusedTurnsError:
            return None
        return shared_start([header, text, other]) if text.startswith(first) else None


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """How messages call a tokenizer."""
    return tokenizer.name_or_path or type(tokenizer).__name__


def content_of(response: Response) -> str:
    """A response's words."""
    return response if isinstance(response, str) else str(response["content"])


class _End(NamedTuple):
    """Where an answer's turn ends in a text, and by which token, if one is written."""

    place: int
    token: str

    @property
    def written(self) -> bool:
        return bool(self.token)


def _end_of(template: ChatTemplate, whole: str, start: int) -> _End:
    tail = template.last
    if tail.text and whole.endswith(tail.text):
        return _End(len(whole) - len(tail.text) + tail.length, tail.end)
    place, token = max((whole.rfind(end, start), end) for end in (*template.ends, "\0"))
    return _End(len(whole), "") if place < 0 else _End(place + len(token), token)


def _to_end(text: str, start: int, eos: str | None) -> tuple[int, int]:
    """A plain turn that reaches to the end of a text, without what stands after its EOS, or the space after it."""
    turn = text[start:].rstrip()
    return start, start + (turn.rindex(eos) + len(eos) if eos and eos in turn else len(turn))


def _everywhere(value: Any, control: ControlTokens) -> Any:
    """A value in all whose texts control tokens are hidden."""
    if isinstance(value, str):
        return control.hide(value)
    if isinstance(value, dict):
        return {name: _everywhere(item, control) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_everywhere(item, control) for item in value]
    return value


def _hiding(texts: Sequence[str]) -> tuple[str, ...]:
    return (HIDDEN,) if any(MARK in text for text in texts) else ()


def _leaves_out(
    texts: Sequence[str], tools: Sequence[dict[str, Any]], messages: Sequence[Message], replies: Sequence[Message]
) -> bool:
    """Whether anything that is said, thought or called, or a tool, stands in no text.

    Thoughts before earlier answers are left out by design.
    """
    said = [*_tool_names(tools), *(name for message in (*messages, *replies) for name in _called(message))]
    for message in messages:
        content = message["content"]
        said.append(content.rpartition("</think>")[2] if message["role"] == "assistant" else content)
    for reply in replies:
        said += [reply.get("reasoning_content") or "", *_THINK.split(reply["content"])]
    return not all(any(_stands_in(thing.strip(), text) for text in texts) for thing in said)


def _stands_in(said: str, text: str) -> bool:
    """Whether a text holds what was said, as it is or as JSON."""
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


def _called(message: Message) -> Iterator[str]:
    return _tool_names(message.get("tool_calls") or ())


def _tool_names(tools: Sequence[dict[str, Any]]) -> Iterator[str]:
    for tool in tools:
        yield str((tool.get("function") or tool).get("name", ""))
