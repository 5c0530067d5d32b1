"""Text to ids: dialogues, chat templates, and the one beginning and one end every sequence has.

A prompt and its response are tokenised apart and joined, so the ids of a prompt never depend on what follows and no
token spans the border: what training sees is what generation continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.chat.messages import Message, Prompt, RefusedTurnsError, Response, Spans, merge_turns
from rlhf_lightning.chat.plain import HUMAN_ASSISTANT, PlainFormat, parse_dialogue, render_plain
from rlhf_lightning.chat.templates import set_chat_template
from rlhf_lightning.chat.tokens import RESERVED, default_prefix
from rlhf_lightning.errors import UserError

DialogueFormat = Literal["auto", "chat_template", "plain"]
Kind = Literal["verbatim", "plain", "template"]
_ADDED = '"added_tokens":'  # stands in a tokenizer's file before everything that is long


class Rendered(NamedTuple):
    """A prompt as text.

    Attributes:
        text: what is tokenised.
        kind: `verbatim`, `plain` (Human/Assistant turns) or `template`; it decides how the response is spaced.
    """

    text: str
    kind: Kind


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
        prefix: ids every sequence begins with, the tokenizer's BOS or nothing.

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
        if dialogue_format == "chat_template" and not tokenizer.chat_template:
            raise self._no_template()
        self.prefix = default_prefix(tokenizer)

    def render(self, prompt: Prompt) -> Rendered:
        """A prompt as the text that is tokenised, ready for the response to follow.

        Raises:
            UserError: messages without a template.
            RefusedTurnsError: a role or an order of turns that the format refuses.
        """
        kind, messages = self._form(prompt)
        if kind == "verbatim":
            return Rendered(str(prompt), kind)
        text = self._apply_template(messages) if kind == "template" else render_plain(messages, self.plain_format)[0]
        return Rendered(text, kind)

    def turns(self, prompt: Prompt, text: str | None = None) -> Spans | None:
        """Where the assistant speaks in a rendered prompt: each turn after its header, to its end.

        A turn is what generation would continue the text before it with, the EOS included where the format writes one.

        Args:
            prompt: what was rendered.
            text: as which it was rendered, where that is at hand.

        Returns:
            The turns in order, none where the prompt is no dialogue; None where they cannot be found, because the
            template writes earlier turns otherwise than it would have had the dialogue ended with them.
        """
        kind, messages = self._form(prompt)
        if kind == "verbatim":
            return []
        if kind == "template":
            return self._template_turns(messages, self._apply_template(messages) if text is None else text)
        plain, spans = render_plain(messages, self.plain_format)
        return [self._to_end(plain[:end], start) for start, end in spans]

    def response_text(self, response: Response, kind: str) -> str:
        """A response spaced as its prompt asks: as the plain format says, stripped after a template, else as it is."""
        if not isinstance(response, str):
            response = str(response["content"])
        if kind == "plain":
            return self.plain_format.response + response.lstrip()
        return response.strip() if kind == "template" else response

    def encode_prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of rendered prompts, int32, each with the tokenizer's own beginning exactly once.

        Args:
            texts: from `render`.
        """
        return [_packed(self._begun(ids)) for ids in self._ids(texts)]

    def encode_turns(self, texts: Sequence[str], spans: Sequence[Spans]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The same ids, and which of them lie wholly in some parts of the text.

        Args:
            texts: from `render`.
            spans: parts of each text, from `turns`.

        Returns:
            Ids of each text, and for each text the parts in tokens, int32: first token, token after the last, and so
            on. A token across a border is left out, a part without a token too.

        Raises:
            UserError: the tokenizer does not say which characters a token stands for.
        """
        backend = self._backend
        if backend is None:
            raise UserError(
                f"tokenizer {self._name} cannot say where its tokens stand in the text, so earlier turns cannot be "
                "found; use one with a tokenizer.json, or teach the last response only"
            )
        prompts, turns = [], []
        for encoding, parts in zip(backend.encode_batch(texts, add_special_tokens=False), spans, strict=True):
            ids = encoding.ids
            begun = self._begun(ids)
            prompts.append(_packed(begun))
            turns.append(_packed(_token_spans(encoding.offsets, parts, len(begun) - len(ids)) if parts else []))
        return prompts, turns

    def encode_responses(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of response texts, int32, each with the EOS at its end exactly once.

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
        return [_packed(ids) for ids in sequences]

    def encode_prompt(self, prompt: Prompt) -> tuple[str, np.ndarray]:
        """Text and ids of one prompt."""
        text = self.render(prompt).text
        return text, self.encode_prompts([text])[0]

    def encode_response(self, prompt: Prompt, response: Response) -> np.ndarray:
        """Ids of one response, to be joined to those of its prompt."""
        return self.encode_responses([self.response_text(response, self._form(prompt)[0])])[0]

    def decode(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """Texts of id sequences, without special tokens."""
        return [self._text(ids, skip_special_tokens=True) for ids in sequences]

    def text_of_first(self, text: str, num_tokens: int) -> str:
        """What the first tokens of a text say, where they are not cut inside a character."""
        return self._text(self._ids([text])[0][:num_tokens], skip_special_tokens=False)

    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text becomes; the tokenizer's name does not count."""
        said = self.describe()
        del said["tokenizer"]
        return _hash(json.dumps(said, sort_keys=True))

    def describe(self) -> dict[str, Any]:
        """What made the ids: name and hash of the tokenizer, hash of its template if it is used, and the format."""
        template = str(self.tokenizer.chat_template) if self._uses_template else None
        return {
            "tokenizer": self._name,
            "tokenizer_hash": self._tokenizer_hash,
            "template_hash": template and _hash(template + json.dumps(self._template_tokens)),
            "dialogue_format": self.dialogue_format,
            "plain_format": None if template else asdict(self.plain_format),
        }

    @property
    def _template_tokens(self) -> dict[str, str]:
        """The special tokens that a template may write by name; the pad token is none that it would."""
        named = self.tokenizer.special_tokens_map.items()
        return {name: str(token) for name, token in sorted(named) if isinstance(token, str) and name != "pad_token"}

    @cached_property
    def _tokenizer_hash(self) -> str:
        """Hash of vocabulary and rules; padding, truncation, and a pad token added behind all others do not count."""
        backend = self._backend
        if backend is None:
            vocabulary, rules = sorted(self.tokenizer.get_vocab().items()), ""
        else:
            whole = backend.to_str()
            # The long rest is hashed as it stands: to parse it would take ten times as long.
            added, end = json.JSONDecoder().raw_decode(whole, whole.index(_ADDED) + len(_ADDED))
            size, pad_token = backend.get_vocab_size(with_added_tokens=False), self.tokenizer.pad_token
            # What was added to serve as padding comes last; the EOS, or a token kept for such use, may serve too.
            last = max((token["id"] for token in added if token["id"] >= size), default=None)
            names = {*RESERVED, pad_token} - {self.tokenizer.eos_token}
            vocabulary = [token for token in added if token["id"] != last or token["content"] not in names]
            rules = whole[end:]
        return _hash(json.dumps([self.tokenizer.eos_token_id, self.prefix, vocabulary]) + rules)

    def _form(self, prompt: Prompt) -> tuple[Kind, list[Message]]:
        """As what a prompt is written, and its messages; none for text that is taken as it stands."""
        if not isinstance(prompt, str):
            if self.dialogue_format == "auto" and not self._uses_template:
                raise self._no_template()
            return ("template" if self._uses_template else "plain"), prompt
        messages = parse_dialogue(prompt)
        if messages is None:
            if self.dialogue_format != "chat_template":
                return "verbatim", []
            return "template", [{"role": "user", "content": prompt}]
        return ("template", merge_turns(messages)) if self._uses_template else ("plain", messages)

    def _template_turns(self, messages: list[Message], text: str) -> Spans | None:
        spans = []
        for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            try:
                before = self._apply_template(messages[:i]) if i else ""
                whole = self._apply_template(messages[: i + 1], answer=False)
            except RefusedTurnsError:
                return None
            if not (i and whole.startswith(before) and text.startswith(whole)):
                return None
            spans.append(self._to_end(whole, len(before)))
        return spans

    def _to_end(self, text: str, start: int) -> tuple[int, int]:
        """A turn that reaches to the end of the text, without what is written after its EOS, or the space after it."""
        turn, eos = text[start:].rstrip(), self.tokenizer.eos_token
        return start, start + (turn.rindex(eos) + len(eos) if eos and eos in turn else len(turn))

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

    def _apply_template(self, messages: list[Message], answer: bool = True) -> str:
        """Messages as text, ready for an answer or as they would end the dialogue."""
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RefusedTurnsError(f"the chat template refuses the turns {roles}: {error}") from error

    def _begun(self, ids: list[int]) -> list[int]:
        n = len(self.prefix)
        return ids if ids[:n] == self.prefix else self.prefix + ids

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = self._backend
        if backend is not None:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        # verbose=False: lengths beyond the model's are ours to cut, no cause for a warning here.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    @property
    def _backend(self) -> Any:
        """What works inside a fast tokenizer, a third faster by itself; None for a slow one."""
        if not self.tokenizer.is_fast:
            return None
        backend = self.tokenizer.backend_tokenizer
        # What another call, or the tokenizer's file, has set must not cut or fill ours.
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _text(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool) -> str:
        whole = np.asarray(ids, dtype=np.int64)
        return str(self.tokenizer.decode(whole, skip_special_tokens, clean_up_tokenization_spaces=False))


def _token_spans(offsets: list[tuple[int, int]], spans: Spans, shift: int) -> list[int]:
    """Parts of a text in tokens, first and one after the last of each, `shift` tokens further on."""
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts = np.searchsorted(places[:, 0], [start for start, _ in spans], side="left")
    ends = np.searchsorted(places[:, 1], [end for _, end in spans], side="right")
    return [int(place) + shift for pair in zip(starts, ends, strict=True) if pair[0] < pair[1] for place in pair]


def _packed(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
