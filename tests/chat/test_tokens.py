"""Control tokens in texts: which count, and how they are hidden and shown again."""

import pytest
from tokenizers import processors

from helpers.models import table_tokenizer
from helpers.tokenizers import Slow
from rlhf_lightning.chat.tokens import MARK, ControlTokens, TextTokens, is_thought, shared_start


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


@pytest.mark.parametrize("token", ["<think>", "</THINK>", "<|begin_of_thought|>", "[reasoning]"])
def test_tokens_around_thoughts_are_known_by_name(token):
    assert is_thought(token)
    assert not is_thought("<|end|>")


def adding_unasked():
    """A tokenizer of whole words that puts a token before each text."""
    tokenizer = table_tokenizer()
    first = processors.TemplateProcessing(single="_ $A", special_tokens=[("_", 0)])
    tokenizer.backend_tokenizer.post_processor = first
    return tokenizer


@pytest.mark.parametrize("tokenizer", [adding_unasked(), Slow()])
def test_a_tokenizer_that_takes_a_mark_into_a_token_is_given_the_pieces(tokenizer):
    tokens = TextTokens(tokenizer, ["ab"])
    a, ba, b = (tokenizer(piece, add_special_tokens=False).input_ids for piece in ("a", "ba", "b"))
    texts = [tokens.control.hide("ab"), "b", tokens.control.hide("abab")]
    assert tokens.ids(texts) == [a + b, b, a + ba + b]
    if tokenizer.is_fast:
        assert tokens.placed(texts[:1]) == [(a + b, [(0, 1), (2, 3)])]  # the mark is at 1


def test_no_tokens_are_found_where_there_are_none():
    assert not ControlTokens([]).within("anything")


def test_what_sequences_begin_with_alike():
    assert [shared_start(pair) for pair in (["ab", "abc"], ["ab", "ac"], ["b", "a"], [[1], [1]])] == [2, 1, 0, 1]
