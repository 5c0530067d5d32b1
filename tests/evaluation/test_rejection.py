"""Rejection sampling: where an instruction stands when answers are drawn, and in the rows."""

from __future__ import annotations

from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.evaluation.rejection import Rejection, with_system

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bake bread"},
]


def test_an_instruction_stands_where_it_is_asked_for():
    asked = WrittenPrompt(TURNS)
    system, again = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Be brief.\n\nbake bread"}
    everywhere, opening = [system, *TURNS[:2], again], [system, *TURNS]
    for kept, drawn, written in (
        ("none", opening, TURNS),
        ("first", everywhere, opening),
        ("all", everywhere, everywhere),
    ):
        rejection = Rejection(system="Be brief.", system_kept=kept)
        assert rejection.drawn_with(asked).prompt == drawn
        assert rejection.kept_as(asked).prompt == written
    own = WrittenPrompt([{"role": "system", "content": "Speak."}, *TURNS])
    assert with_system(own, "Be brief.", True).prompt == [
        {"role": "system", "content": "Be brief.\n\nSpeak."},
        *TURNS[:2],
        again,
    ]
    assert own.prompt[0]["content"] == "Speak."
    assert Rejection().drawn_with(asked) is Rejection().kept_as(asked) is asked
