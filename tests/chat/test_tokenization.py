"""Texts to ids: hidden control tokens become ordinary ones, and nothing is added unasked."""

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from helpers.models import table_tokenizer
from helpers.tokenizers import Slow, tiny_tokenizer
from rlhf_lightning.chat.tokenization import TextTokens, shared_start, token_spans


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


def test_what_sequences_begin_with_alike():
    assert [shared_start(pair) for pair in (["ab", "abc"], ["ab", "ac"], ["b", "a"], [[1], [1]])] == [2, 1, 0, 1]


def test_which_tokens_may_stand_in_what_is_said():
    tokenizer = tiny_tokenizer()  # names two of its four special tokens
    tokenizer.add_tokens(["<plain>"])
    tokens = TextTokens(tokenizer, ["<more>", "</think>"])
    text = "<|pad|><|bos|><|end|><|start|><plain><more></think>"
    assert tokens.control.all(text) == ["<|pad|>", "<|bos|>", "<|end|>", "<|start|>", "<more>", "</think>"]
    assert tokens.control_of_answers.all(text) == ["<|pad|>", "<|bos|>", "<|end|>", "<|start|>", "<more>"]
    bare = SimpleNamespace(all_special_tokens=["<e>"])  # lists no tokens that were added
    assert TextTokens(bare).control.all("a <e>") == ["<e>"]


@pytest.mark.parametrize("normalizer", [None, normalizers.Lowercase()])
def test_at_which_tokens_a_text_is_divided_first(normalizer):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    kinds = {
        "<left>": AddedToken("<left>", normalized=False, lstrip=True),
        "<word>": AddedToken("<word>", normalized=False, single_word=True),
        "<norm>": AddedToken("<norm>", normalized=True),
        "<right>": AddedToken("<right>", normalized=False, rstrip=True),
    }
    tokenizer.add_tokens(list(kinds.values()))
    divided = {"<right>", *(["<norm>"] if normalizer is None else [])}
    assert TextTokens(tokenizer).splitting & kinds.keys() == divided
    assert TextTokens(Slow()).splitting == frozenset()


class Beginning(Slow):
    """Puts a token before each text unasked."""

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [2, *token_ids_0]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(bos=True), Beginning()])
def test_nothing_is_added_unasked(tokenizer):
    tokenizer.model_max_length = 2
    assert tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids
    tokens = TextTokens(tokenizer, ["ab"])
    a, b, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", "b", "bba"))
    tokenizer.deprecation_warnings.clear()
    assert tokens.ids(["bba", tokens.control.hide("ab"), "bba"]) == [whole, a + b, whole]
    assert not tokenizer.deprecation_warnings  # of lengths, which are not the tokenizer's concern


def test_a_token_that_begins_with_a_mark_holds_it():
    tokenizer = table_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    tokens = TextTokens(tokenizer, ["ab"])
    assert tokens.placed([tokens.control.hide("ab")]) == [([1, 2], [(0, 1), (2, 3)])]


def test_parts_of_a_text_in_tokens():
    offsets = [(0, 2), (2, 4), (4, 5)]
    assert token_spans(offsets, [(0, 2), (2, 5)], 0) == [0, 1, 1, 3]
    assert token_spans(offsets, [(0, 3), (3, 5)], 7) == [7, 8, 9, 10]  # not the token across the border
    assert token_spans(offsets, [(2, 3), (5, 9)], 7) == []
    assert token_spans([], [(0, 2)], 7) == []
