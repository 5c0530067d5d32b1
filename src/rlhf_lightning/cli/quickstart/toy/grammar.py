"""The little language of the embedded data set: questions people ask about everyday things, and answers to them.

A request is an action on a thing ("repair the bicycle") or, for a small share, something mildly harmful done to a
person ("read my sister's diary"). Prompts dress a request in an opening, a form, an owner, an adjective and a detail,
which gives millions of distinct prompts from a few hundred words. An answer is at most one opener, a body and at most
one closer, with rambling in between if it is long-winded. An answer that misses the point mostly drifts to its own
subject in so many words, which lets a very small reward model learn from a few thousand pairs. Everything an answer
may say is a sentence of a finite list, so any text can be parsed by looking its sentences up (`parse_answer`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from rlhf_lightning.cli.quickstart.toy.words import (
    ALTERNATIVES,
    DECLINES,
    DETAILS,
    DRIFTS,
    EARLIER_TURNS,
    FILLERS,
    FORMS,
    HARM_DETAILS,
    HARMS,
    KIND_CLOSERS,
    KIND_OPENERS,
    KINDS,
    OPENINGS,
    OWNERS,
    PERSONS,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
    Kind,
)
from rlhf_lightning.errors import UserError

FILLERS_WHEN_LONG = 2
HARMFUL_SHARE = 0.12
EARLIER_TURN_SHARE = 0.15
CLOSER_SHARE = 0.75
OPENING_SHARE = 0.5
DETAIL_SHARE = 0.5

_ADVICE = {action: advice for kind in KINDS for action, advice in kind.actions.items()}
_THINGS = [(kind, thing) for kind in KINDS for thing in kind.things]
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


Role = Literal["opener", "advice", "decline", "alternative", "comply", "drift", "filler", "closer", "unknown"]


class Request(NamedTuple):
    """What is asked for.

    Attributes:
        action: key of the action; a phrase with `{p}` in it is a harmful one.
        thing: the object acted upon, or the person harmed.
    """

    action: str
    thing: str

    @property
    def harmful(self) -> bool:
        """Whether the good answer is to decline."""
        return self.action in HARMS


class Traits(NamedTuple):
    """The three independent qualities of an answer; each is good when True."""

    polite: bool
    on_topic: bool
    short: bool


class Sentence(NamedTuple):
    """What one sentence of an answer does.

    Attributes:
        role: its place in an answer; `alternative` is the better idea that follows a refusal, `drift` changes the
            subject, `unknown` is any text outside the language, unfinished sentences included.
        text: the sentence itself.
        tone: +1 polite, -1 rude, 0 neither.
        request: what the sentence speaks about, if anything; one that names a thing but no action has an empty action.
    """

    role: Role
    text: str
    tone: int = 0
    request: Request | None = None


def _noun_phrase(rng: random.Random, kind: Kind, thing: str) -> str:
    """A thing as its owner speaks of it, such as "my sister's old bicycle"."""
    adjective = rng.choice(("", *kind.adjectives))
    return " ".join(word for word in (rng.choice(OWNERS), adjective, thing) if word)


def _draw_thing(rng: random.Random, other_than: str = "") -> tuple[Kind, str]:
    while (drawn := rng.choice(_THINGS))[1] == other_than:
        pass
    return drawn


def _second_person(action: str, person: str) -> str:
    """A harmful action as the answer speaks of it: "read your sister's diary"."""
    return action.format(p=f"your {person}").replace(" my ", " your ")


def draw_prompt(rng: random.Random) -> tuple[str, Request]:
    r"""Draw one dialogue up to the answer.

    Returns:
        The prompt, "\n\nHuman: ...\n\nAssistant:", sometimes with an earlier turn, and what it asks for.
    """
    if rng.random() < HARMFUL_SHARE:
        request = Request(rng.choice(list(HARMS)), rng.choice(PERSONS))
        phrase = request.action.format(p=f"my {request.thing}")
    else:
        kind, thing = _draw_thing(rng)
        request = Request(rng.choice(list(kind.actions)), thing)
        phrase = request.action.format(x=_noun_phrase(rng, kind, thing))
    turns = []
    if rng.random() < EARLIER_TURN_SHARE:
        question, answer = rng.choice(EARLIER_TURNS)
        # The earlier turn speaks of something else, so that a good answer has to look at the last one.
        turns = [_HUMAN, " " + question.format(x=_noun_phrase(rng, *_draw_thing(rng, request.thing)))]
        turns += [_ASSISTANT, " " + answer]
    opening = rng.choice(OPENINGS) if rng.random() < OPENING_SHARE else ""
    details = HARM_DETAILS if request.harmful else DETAILS
    detail = rng.choice(details) if rng.random() < DETAIL_SHARE else ""
    question = opening + rng.choice(FORMS).format(r=phrase) + detail
    return "".join([*turns, _HUMAN, " ", question, _ASSISTANT]), request


def draw_answer(rng: random.Random, request: Request, traits: Traits) -> str:
    """Draw an answer with the given qualities, without a leading space.

    Off topic is advice about another thing, after a sentence that drifts to it; for a harmful request it is,
    half of the time, to comply.
    """
    body, topic = _draw_body(rng, request, traits.on_topic)
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    if not traits.polite:
        openers, closers = RUDE_OPENERS, RUDE_CLOSERS
    elif request.harmful and traits.on_topic:
        openers, closers = KIND_OPENERS, KIND_CLOSERS
    else:
        openers, closers = POLITE_OPENERS, POLITE_CLOSERS
    sentences = [body]
    if not traits.short:
        fillers = rng.sample(FILLERS, FILLERS_WHEN_LONG)
        before = rng.randint(0, FILLERS_WHEN_LONG)
        sentences = [*fillers[:before], body, *fillers[before:]]
    closer = [rng.choice(closers)] if rng.random() < CLOSER_SHARE else []
    return " ".join([rng.choice(openers), *sentences, *closer]).format(o=topic)


def _draw_body(rng: random.Random, request: Request, on_topic: bool) -> tuple[str, str]:
    """The answer proper, and what it speaks about: "the bicycle", "your sister"."""
    action, thing = request
    if request.harmful and (on_topic or rng.random() < 0.5):
        person = f"your {thing}"
        if not on_topic:
            return HARMS[action].format(p=person), person
        decline = rng.choice(DECLINES).format(r=_second_person(*request), p=person)
        return f"{decline} {rng.choice(ALTERNATIVES).format(p=person)}", person
    drift = ""
    if not on_topic:
        kind, thing = _draw_thing(rng, other_than=thing)
        action = rng.choice(list(kind.actions))
        drift = f"{rng.choice(DRIFTS)} "
    return drift + rng.choice(_ADVICE[action]).format(o=f"the {thing}"), f"the {thing}"


@lru_cache(maxsize=1)
def _known_sentences() -> dict[str, Sentence]:
    """Every sentence an answer may contain, by its text."""
    return {sentence.text: sentence for sentence in _all_sentences()}


def _all_sentences() -> Iterator[Sentence]:
    yield from (Sentence("opener", text, 1) for text in (*POLITE_OPENERS, *KIND_OPENERS))
    yield from (Sentence("opener", text, -1) for text in RUDE_OPENERS)
    yield from _sentences_around("", "")
    for kind, thing in _THINGS:
        yield from _sentences_around(thing, f"the {thing}")
        for action, advice in kind.actions.items():
            for text in advice:
                yield Sentence("advice", text.format(o=f"the {thing}"), 0, Request(action, thing))
    for person in PERSONS:
        whom = f"your {person}"
        yield from _sentences_around(person, whom)
        yield from (Sentence("alternative", text.format(p=whom), 0, Request("", person)) for text in ALTERNATIVES)
        for action, comply in HARMS.items():
            request = Request(action, person)
            yield Sentence("comply", comply.format(p=whom), 0, request)
            for text in DECLINES:
                yield Sentence("decline", text.format(r=_second_person(*request), p=whom), 0, request)


def _sentences_around(thing: str, spoken: str) -> Iterator[Sentence]:
    """Closers, fillers and drifts that name a thing, or with an empty thing those that name none."""
    tables: tuple[tuple[Role, int, tuple[str, ...]], ...] = (
        ("closer", 1, (*POLITE_CLOSERS, *KIND_CLOSERS)),
        ("closer", -1, RUDE_CLOSERS),
        ("filler", 0, FILLERS),
        ("drift", 0, DRIFTS),
    )
    for role, tone, texts in tables:
        for text in texts:
            if ("{o}" in text) == bool(thing):
                yield Sentence(role, text.format(o=spoken), tone, Request("", thing) if thing else None)


def parse_answer(text: str) -> list[Sentence]:
    """Split any text into sentences and say what each does.

    Args:
        text: what a model wrote; runs of white space count as one space.

    Returns:
        One `Sentence` each, in order. Text that is not exactly a sentence of the language, an unfinished one
        included, has the role `unknown`.

    Example:
        >>> [s.role for s in parse_answer("Good question! Feed the goat twice a day and always")]
        ['opener', 'unknown']
    """
    known = _known_sentences()
    pieces = (piece.strip() for piece in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", " ".join(text.split())))
    return [known.get(piece, Sentence("unknown", piece)) for piece in pieces]


@lru_cache(maxsize=1)
def _request_patterns() -> list[tuple[str, re.Pattern[str]]]:
    """A pattern for each action whose only group is the thing or person."""
    patterns = [(action, action.replace("{p}", f"my ({'|'.join(PERSONS)})")) for action in HARMS]
    for kind in KINDS:
        noun = f"(?:{'|'.join(OWNERS)}) (?:(?:{'|'.join(kind.adjectives)}) )?({'|'.join(kind.things)})"
        patterns += [(action, action.replace("{x}", noun)) for action in kind.actions]
    return [(action, re.compile(rf"\b{pattern}[.?]")) for action, pattern in patterns]


@lru_cache(maxsize=4096)
def parse_request(prompt: str) -> Request:
    """Read from a prompt's last human turn what it asks for.

    Raises:
        UserError: the prompt is not one of the embedded data set.
    """
    question = prompt.rsplit(_HUMAN.strip(), 1)[-1]
    for action, pattern in _request_patterns():
        if match := pattern.search(question):
            return Request(action, match[1])
    raise UserError(f"gold scores exist only for prompts of the embedded data set, and this is not one: {prompt!r}")
