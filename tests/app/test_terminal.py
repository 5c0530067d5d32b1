"""A conversation in the terminal, as somebody types it."""

from __future__ import annotations

import pytest

from helpers.chat_page import tiny_models
from rlhf_lightning.app.models import Ask, Models
from rlhf_lightning.app.terminal import HELP, TerminalChat
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.generation.sampling import Sampling

SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def talk(models, monkeypatch, capsys):
    """What is printed and what was said, after lines are typed; an exception among them is raised instead."""

    def type_lines(*lines):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        chat = TerminalChat(models, SAMPLING, seed=1)
        chat.run()
        return chat, capsys.readouterr()

    return type_lines


def expected(models, history, model=0):
    ask = Ask(models.choices[model], WrittenPrompt(history), (len(history),))
    return [*models.stream([ask], SAMPLING, 1)][-1][0].text


def test_turns_build_on_one_another(talk, models):
    chat, printed = talk("hello", "and then?")
    said = [{"role": "user", "content": "hello"}]
    said.append({"role": "assistant", "content": expected(models, said)})
    said.append({"role": "user", "content": "and then?"})
    said.append({"role": "assistant", "content": expected(models, said)})
    assert chat.history == said
    for turn in said[1::2]:
        assert f"{turn['content']}\n(score " in printed.out


def test_commands(talk, models):
    chat, printed = talk("hello", "/reset", "/temperature 0", "/model 2", "/help", "/quit", "never read")
    assert chat.history == []
    assert chat.sampling.temperature == 0
    assert chat.model == models.choices[1]
    assert HELP in printed.out
    assert f"* 2  {models.choices[1]}" in printed.out


def test_what_cannot_be_is_one_line_and_the_talk_goes_on(talk, models):
    chat, printed = talk("/models", "/temperature warm", "/temperature -1", "/model 9", "hello")
    errors = printed.err.splitlines()
    assert errors[0] == "error: there is no /models; /help names what there is"
    assert errors[1] == "error: /temperature needs a number from 0 on, not 'warm'"
    assert "-1" in errors[2]
    assert "'9' is none of the models here" in errors[3]
    assert len(chat.history) == 2


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(talk, monkeypatch):
    def interrupted(self, before, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(TerminalChat, "_show", interrupted)
    chat, printed = talk("hello", KeyboardInterrupt())
    assert "(stopped)" in printed.out
    assert [turn["role"] for turn in chat.history] == ["user", "assistant"]


def test_an_answer_that_was_stopped_before_its_first_word_is_no_turn(talk, monkeypatch):
    def stream(self, asks, sampling, seed, stopped):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Models, "stream", stream)
    chat, printed = talk("hello")
    assert "(stopped)" in printed.out
    assert chat.history == []
