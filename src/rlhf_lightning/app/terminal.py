"""Talking to models in the terminal."""

from __future__ import annotations

import importlib
import sys
from contextlib import closing, suppress
from dataclasses import replace
from threading import Event

from rlhf_lightning.app.models import Ask, Models
from rlhf_lightning.chat.messages import Message
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.sampling import Sampling

HELP = """\
/reset             forget the conversation
/model [NAME]      the models, or talk to another one: its name or its number
/temperature X     0 takes the most likely token
/help              this
/quit              leave, as Ctrl-D does; Ctrl-C stops an answer\
"""


class TerminalChat:
    """A conversation, line by line.

    Args:
        models: what may be asked.
        sampling: how answers are drawn.
        seed: the same for the same answers.
    """

    def __init__(self, models: Models, sampling: Sampling, seed: int) -> None:
        self.models, self.sampling, self.seed = models, sampling, seed
        self.model = models.choices[0]
        self.history: list[Message] = []

    def run(self) -> None:
        """Read lines and answer them until the end of the input."""
        with suppress(ImportError):  # on Windows
            importlib.import_module("readline")  # gives `input` its history
        self.models.load(self.model)
        print(f"{self.model}; /help says what else there is", flush=True)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    print(self.command(line), flush=True)
                elif line:
                    self.answer(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)

    def command(self, line: str) -> str:
        """Do what a command says; returns what there is to say.

        Args:
            line: with its `/`.

        Raises:
            UserError: a command or a value that there is not.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/help":
            return HELP
        if name == "/reset":
            self.history = []
            return "the conversation is forgotten"
        if name == "/temperature":
            try:
                self.sampling = replace(self.sampling, temperature=float(value))
            except ValueError as error:
                raise UserError(f"/temperature needs a number from 0 on, not '{value}'") from error
            return f"temperature {self.sampling.temperature:g}"
        if name == "/model":
            return self._model(value)
        raise UserError(f"there is no {name}; /help names what there is")

    def _model(self, value: str) -> str:
        choices = self.models.choices
        if value:
            chosen = choices[int(value) - 1] if value.isdecimal() and 1 <= int(value) <= len(choices) else value
            self.models.load(chosen)
            self.model = chosen
        return "\n".join(f"{'*' if name == self.model else ' '} {n}  {name}" for n, name in enumerate(choices, 1))

    def answer(self, line: str) -> None:
        """Answer a turn of the user as the words come, and score the answer; Ctrl-C keeps what there is of it.

        Args:
            line: the turn.

        Raises:
            UserError: turns that the model cannot read; the conversation is as it was.
        """
        turns: list[Message] = [*self.history, {"role": "user", "content": line}]
        ask = Ask(self.model, WrittenPrompt(turns), (len(turns),))
        if not self.models.fits(ask, self.sampling.max_new_tokens):
            print(f"({self.model} has no room for all of this: it reads the end only)", file=sys.stderr, flush=True)
        text, ended, stopped = "", False, Event()
        with closing(self.models.stream([ask], self.sampling, self.seed, stopped)) as steps:
            try:
                for (answer,) in steps:
                    before, text, ended = text, answer.text, answer.ended
                    self._show(before, text)
            except KeyboardInterrupt:
                stopped.set()
                print(" (stopped)", end="")
        print(flush=True)
        if stopped.is_set() and not text:
            return  # nothing was said: no template takes a turn that is empty
        self.history = [*turns, {"role": "assistant", "content": text}]
        if text and (verdict := self.models.verdict(ask.written, text, ended)):
            print(f"(score {verdict.score:+.2f})", flush=True)

    @staticmethod
    def _show(before: str, text: str) -> None:
        """What is new of an answer; all of it, where a tokenizer has taken words back."""
        print(text[len(before) :] if text.startswith(before) else f"\n{text}", end="", flush=True)
