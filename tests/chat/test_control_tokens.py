"""Control tokens in texts: which count, and how they are hidden and shown again."""

import pytest

from rlhf_lightning.chat.control_tokens import MARK, ControlTokens, is_thought


def test_of_tokens_that_begin_alike_the_longest_is_found():
    control = ControlTokens(["<|a", "<|a|>", "ab", "x"])
    assert control.all("<|a|> ab <|a x") == ["<|a|>", "ab", "<|a"]
    assert control.first("x <|a|>").span() == (2, 7)
    assert not control.within("x")  # one character is text


def test_hidden_tokens_are_marked_behind_their_first_character_and_shown_again():
    control = ControlTokens(["<|a", "<|a|>", "ab"])
    hidden = control.hide("say <|a|> or ab")
    assert hidden == f"say <{MARK}|a|> or a{MARK}b"
    assert control.marks(hidden) == [5, 15]
    assert control.shown(hidden) == "say <|a|> or ab"
    own = f"a mark {MARK} of one's own"
    assert (control.hide(own), control.shown(own), control.marks(own)) == (own, own, [])
    marked = ControlTokens([f"<a{MARK}b>"])
    assert marked.shown(marked.hide(f"<a{MARK}b>")) == f"<a{MARK}b>"


@pytest.mark.parametrize("token", ["<think>", "</THINK>", "<|begin_of_thought|>", "[reasoning]"])
def test_tokens_around_thoughts_are_known_by_name(token):
    assert is_thought(token)
    assert not is_thought("<|end|>")


def test_no_tokens_are_found_where_there_are_none():
    assert not ControlTokens([]).within("anything")
