"""Dialogues to the ids a model sees, each with the one beginning and the one end that its format gives it.

The ids of a prompt and of its response, joined, are those of the whole text; and the ids of the prompt are those that
generation is given. Where a token would span the border both cannot be, and the response is tokenised apart. Text that
goes through no chat template is always tokenised so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.fingerprint import hash_of, hash_of_template, hash_of_tokenizer
from rlhf_lightning.chat.messages import Prompt, RefusedTurnsError, Response
from rlhf_lightning.chat.plain import HUMAN_ASSISTANT, PlainFormat
from rlhf_lightning.chat.templates import set_chat_template
from rlhf_lightning.chat.tokenization import default_prefix, shared_start, token_spans
from rlhf_lightning.chat.writer import Dialogue, DialogueFormat, DialogueWriter, Kind, Written, name_of
from rlhf_lightning.errors import UserError

ResultT = TypeVar("ResultT")

APART = "response tokenised apart"
_RENDERING = 2
"""Version of what is made of a dialogue; tokens prepared by another version are not used."""


class Rendered(NamedTuple):
    """A prompt as text.

    Attributes:
        text: what is tokenised.
        kind: `verbatim`, `plain` (Human/Assistant turns) or `template`.
    """

    text: str
    kind: Kind


class Encoded(NamedTuple):
    """A dialogue as ids.

    Attributes:
        written: the texts.
        prompt: ids, int32.
        turns: where the assistant spoke earlier in the prompt, int32: first token, token after the last, and so on.
        responses: ids of each response, int32, its end of turn included.
        notes: what is to be counted.
        asked: ids of the prompt that generation is given, int32; another where a template does not continue it.
    """

    written: Written
    prompt: np.ndarray
    turns: np.ndarray
    responses: list[np.ndarray]
    notes: tuple[str, ...]
    asked: np.ndarray


class ChatEncoder:
    """Turns prompts and responses into the ids a model sees.

    Text is a prompt as it stands, except where it is a dialogue in Human and Assistant turns; dialogues and lists of
    messages go through the tokenizer's chat template if it has one.

    Args:
        tokenizer: used as it is; no token is added to it.
        dialogue_format: `auto` as said above, except that messages need a template; `plain` writes every dialogue in
            the plain format; `chat_template` sends every prompt through the template, a plain text as one user turn.
        chat_template: path or text of a Jinja template to set on the tokenizer.
        plain_format: how dialogues are written that go through no template.

    Attributes:
        prefix: ids that text begins with which goes through no template, the tokenizer's BOS or nothing.

    Raises:
        UserError: a bad template, or `chat_template` asked of a tokenizer that has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dialogue_format: DialogueFormat = "auto",
        chat_template: str | None = None,
        plain_format: PlainFormat = HUMAN_ASSISTANT,
    ) -> None:
        self.tokenizer = tokenizer
        self.dialogue_format = dialogue_format
        self.plain_format = plain_format
        if chat_template is not None:
            set_chat_template(tokenizer, chat_template)
        self._writer = DialogueWriter(tokenizer, dialogue_format, plain_format)
        self._tokens = self._writer.tokens
        self.prefix = default_prefix(tokenizer)

    def render(self, prompt: Prompt, tools: Sequence[dict[str, Any]] = ()) -> Rendered:
        """A prompt as the text that is tokenised, ready for the response to follow.

        Raises:
            UserError: messages without a template.
            RefusedTurnsError: a role or an order of turns that the format refuses.
        """
        written = self._writer.write(Dialogue(prompt, tools=tools))
        return Rendered(self._tokens.control.shown(written.prompt), written.kind)

    def kind(self, prompt: Prompt) -> Kind:
        """As what a prompt is written.

        Raises:
            UserError: messages without a template.
        """
        return self._writer.form(prompt)[0]

    def encode_dialogues(
        self, dialogues: Sequence[Dialogue], need_turns: bool = False
    ) -> list[Encoded | RefusedTurnsError]:
        """Ids of dialogues, many at a time.

        Args:
            dialogues: each with any number of responses.
            need_turns: find the earlier turns of the assistant too; it costs a little, and takes a fast tokenizer.

        Returns:
            One for each dialogue; the error where the format refuses its turns.

        Raises:
            UserError: something that is wrong with all of them, such as messages without a chat template.
        """
        if need_turns and not self.tokenizer.is_fast:
            raise UserError(
                f"tokenizer {name_of(self.tokenizer)} cannot say where its tokens stand in the text, so earlier turns "
                "cannot be found; use one with a tokenizer.json, or teach the last response only"
            )
        results: list[Written | RefusedTurnsError] = []
        for dialogue in dialogues:
            try:
                results.append(self._writer.write(dialogue, need_turns))
            except RefusedTurnsError as error:
                results.append(error)
        encoded = self._encode([result for result in results if isinstance(result, Written)])
        return [next(encoded) if isinstance(result, Written) else result for result in results]

    def encode_dialogue(
        self, prompt: Prompt, response: Response, tools: Sequence[dict[str, Any]] = (), ended: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of one prompt and its response, int32, as `encode_dialogues` makes them of many.

        Args:
            prompt: text or messages.
            response: text, or a message of the assistant.
            tools: that the assistant may call.
            ended: whether the response ended by itself; one that was cut has no end of turn.

        Raises:
            UserError: messages without a template, or turns that the format refuses.
        """
        (result,) = self.encode_dialogues([Dialogue(prompt, (response,), tools)])
        if isinstance(result, RefusedTurnsError):
            raise result
        return result.prompt, result.responses[0] if ended else result.responses[0][:-1]

    def encode_prompt(self, prompt: Prompt, tools: Sequence[dict[str, Any]] = ()) -> tuple[str, np.ndarray]:
        """Text and ids of one prompt, as generation is given it.

        Raises:
            UserError: messages without a template, or turns that the format refuses.
        """
        (result,) = self.encode_dialogues([Dialogue(prompt, tools=tools)])
        if isinstance(result, RefusedTurnsError):
            raise result
        return self._tokens.control.shown(result.written.prompt), result.prompt

    def encode_text(self, text: str, kind: Kind) -> np.ndarray:
        """Ids of a text that begins a sequence, int32.

        Args:
            text: part of a prompt as it was written.
            kind: as what; the tokenizer's own beginning comes before all but what a template writes.
        """
        (ids,) = self._tokens.ids([text])
        return _packed(self._begun(ids, kind))

    def beginning(self, ids: np.ndarray) -> list[int]:
        """The ids that a prompt keeps at its beginning when it is cut: the BOS, or nothing."""
        bos = self.tokenizer.bos_token_id
        for start in (self.prefix, [] if bos is None else [bos]):
            if start and ids[: len(start)].tolist() == start:
                return start
        return []

    def decode(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """Texts of id sequences, without special tokens."""
        return [self._text(ids, skip_special_tokens=True) for ids in sequences]

    def text_of_first(self, text: str, num_tokens: int) -> str:
        """What the first tokens of a text say, where they are not cut inside a character."""
        return self._text(self._tokens.ids([text])[0][:num_tokens], skip_special_tokens=False)

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text becomes; the tokenizer's name does not count."""
        said = self.describe()
        del said["tokenizer"]
        return hash_of(json.dumps(said, sort_keys=True))

    def describe(self) -> dict[str, Any]:
        """What made the ids: name and hash of the tokenizer, hash of its template if it is used, and the format."""
        template = self._writer.template is not None
        return {
            "tokenizer": name_of(self.tokenizer),
            "tokenizer_hash": self._tokenizer_hash,
            "template_hash": hash_of_template(self.tokenizer) if template else None,
            "dialogue_format": self.dialogue_format,
            "plain_format": None if template else asdict(self.plain_format),
            "rendering": _RENDERING,
        }

    @cached_property
    def _tokenizer_hash(self) -> str:
        return hash_of_tokenizer(self.tokenizer, self.prefix)

    # Ids of what was written

    def _encode(self, written: Sequence[Written]) -> Iterator[Encoded]:
        """Ids of texts: all are tokenised in one call, and the few that must be taken apart in another."""
        cuts = [self._cut(one) for one in written]
        ids = _each_once(self._tokens.ids, (text for cut in cuts for text in (cut.head, cut.first, *cut.answers)))
        asked = _each_once(self._tokens.ids, (one.asked for one in written if one.asked))
        joined = [_join(one, cut, ids) for one, cut in zip(written, cuts, strict=True)]
        apart = _each_once(self._tokens.ids, (text for _, parts in joined for text in parts if isinstance(text, str)))
        places = _each_once(self._tokens.placed, (cut.spanned for cut in cuts if cut.spanned))
        for one, cut, (shared, parts) in zip(written, cuts, joined, strict=True):
            prompt = self._begun(ids[cut.head], one.kind) + ids[cut.first][:shared]
            turns: list[int] = []
            if one.spans and cut.spanned:
                before = len(prompt) - len(ids[cut.head]) - shared  # what the tokenizer itself begins with
                offsets = places[cut.spanned][1][: len(prompt) - before]
                turns = token_spans(offsets, one.spans, before)
            responses = [
                self._with_end(apart[part] if isinstance(part, str) else part, ended)
                for part, ended in zip(parts, one.ended, strict=True)
            ]
            notes = one.notes + (APART,) * sum(isinstance(part, str) for part in parts)
            packed = _packed(prompt)
            yield Encoded(
                one,
                packed,
                _packed(turns),
                [_packed(response) for response in responses],
                notes,
                _packed(asked[one.asked]) if one.asked else packed,
            )

    def _cut(self, one: Written) -> _Cut:
        """Where the texts of a dialogue are cut, so that what they have in common is tokenised once."""
        place = len(one.prompt)
        if one.kind == "template":
            assert self._writer.template is not None
            anchor = self._writer.template.anchor
            place = max(0, one.prompt.rfind(anchor, 0, one.common)) if anchor in self._tokens.splitting else 0
        head, first = one.prompt[:place], one.prompt[place:]
        spanned = "" if not one.spans else head if one.spans[-1][1] <= place else one.prompt
        return _Cut(
            head, first, [answer[place:] if one.kind == "template" else answer for answer in one.answers], spanned
        )

    def _with_end(self, ids: list[int], ended: bool) -> list[int]:
        if ended:
            return ids
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                f"tokenizer {name_of(self.tokenizer)} has no EOS token, so no response could ever end; set `eos_token`"
            )
        return [*ids, eos]

    def _begun(self, ids: list[int], kind: Kind) -> list[int]:
        """A template begins its text itself; before other text comes the tokenizer's own beginning, exactly once."""
        n = len(self.prefix)
        return ids if kind == "template" or ids[:n] == self.prefix else self.prefix + ids

    def _text(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool) -> str:
        whole = np.asarray(ids, dtype=np.int64)
        return str(self.tokenizer.decode(whole, skip_special_tokens, clean_up_tokenization_spaces=False))


class _Cut(NamedTuple):
    """A dialogue's texts in pieces, cut where the tokenizer cuts before all else.

    Attributes:
        head: what prompt and answers have in common.
        first: the rest of the prompt.
        answers: the rest of each answer; what a template wrote begins with the rest of the prompt again.
        spanned: the beginning of the prompt in which the places of tokens are asked for, or nothing.
    """

    head: str
    first: str
    answers: list[str]
    spanned: str


def _join(one: Written, cut: _Cut, ids: Mapping[str, list[int]]) -> tuple[int, list[list[int] | str]]:
    """How many ids of the prompt's rest are the prompt, and what follows: ids, or text that is to be taken apart."""
    first, answers = ids[cut.first], [ids[answer] for answer in cut.answers]
    if one.kind != "template":
        return 0, [*answers]
    if one.common < len(one.prompt):
        shared = shared_start([first, *answers])
        return shared, [answer[shared:] for answer in answers]
    n, length = len(first), len(one.prompt)
    return n, [
        answer[n:] if answer[:n] == first else text[length:] for answer, text in zip(answers, one.answers, strict=True)
    ]


def _each_once(make: Callable[[list[str]], list[ResultT]], texts: Iterable[str]) -> dict[str, ResultT]:
    """What is made of each text, all in one call and none twice."""
    different = list(dict.fromkeys(texts))
    return dict(zip(different, make(different), strict=True))


def _packed(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)
