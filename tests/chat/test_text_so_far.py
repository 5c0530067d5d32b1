"""The text that is shown while tokens come in only grows, and ends as the text of all of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.templates import shelf_tokenizer, single_bytes
from helpers.tokenizers import Slow, tiny_tokenizer
from rlhf_lightning.chat.text_so_far import TextSoFar, decode_response

TOKENIZERS = {
    "bytes": shelf_tokenizer("chatml"),
    "single bytes": single_bytes(),
    "tiny": tiny_tokenizer(chat_template=True),
    "python": Slow(),
}
TEXTS = st.text(st.sampled_from("ab é\n.,'ß€字😀👩‍🚀�ก") | st.characters(exclude_categories=["Cs"]), max_size=12)


def read_all(tokenizer, ids):
    reader = TextSoFar(tokenizer)
    return [reader.read(ids[:n]) for n in range(1, len(ids) + 1)] + [reader.read(ids, complete=True)]


def check(tokenizer, ids):
    texts = read_all(tokenizer, ids)
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts)), texts
    assert texts[-1] == decode_response(tokenizer, ids)
    return texts


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_any_tokens_at_all(name, data):
    tokenizer = TOKENIZERS[name]
    check(tokenizer, data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)))


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "python"])
@given(text=TEXTS)
@example("👩‍🚀字")
def test_text_that_somebody_wrote_is_never_shown_with_half_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    for shown in check(tokenizer, tokenizer.encode(text, add_special_tokens=False)):
        assert text.count("�") >= shown.count("�"), "no character was shown that nobody wrote"


def test_what_is_settled_is_shown_at_once():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("a € b", add_special_tokens=False)
    for n, shown in enumerate(read_all(tokenizer, ids)[:-1], 1):
        assert shown == decode_response(tokenizer, ids[:n]).rstrip("�")


def test_bytes_around_a_token_that_is_not_written_are_one_group():
    tokenizer = TOKENIZERS["single bytes"]
    euro = tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>"])
    assert read_all(tokenizer, [*euro, tokenizer.eos_token_id, euro[0]]) == ["", "", "", "", "", "����"]
