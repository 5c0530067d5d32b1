import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.data.chat import ChatEncoder
from rlhf_lightning.data.collate import EncodedPrompt, pack_ids
from rlhf_lightning.data.encode import drop_duplicates, encode_pairs
from rlhf_lightning.data.limits import TokenLimits, check_context, cut_prompt, fit_sequences
from rlhf_lightning.data.rows import Pair
from rlhf_lightning.errors import UserError

BOS, EOS = 1, 2
PROMPT = [BOS, 10, 11, 12, 13]
RESPONSE = [20, 21, 22, EOS]


def fit(limits, prompt=PROMPT, responses=(RESPONSE,)):
    counts = Counter()
    fitted = fit_sequences(prompt, list(responses), limits, [BOS], counts)
    return fitted, {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(
    ("limits", "prompt", "response", "counts"),
    [
        (TokenLimits(9, None, 1, "cut"), PROMPT, RESPONSE, {}),  # just fits
        (TokenLimits(8, None, 1, "cut"), PROMPT, [20, 21, 22], {"cut: response": 1}),  # no EOS
        (TokenLimits(8, None, 4, "cut"), [BOS, 11, 12, 13], RESPONSE, {"cut: prompt": 1}),
        (
            TokenLimits(8, None, 7, "cut"),
            [BOS, 11, 12, 13],
            RESPONSE,
            {"cut: prompt": 1},
        ),  # room for all of 4 is enough
        (TokenLimits(8, 2, 1, "cut"), [BOS, 13], RESPONSE, {"cut: prompt": 1}),
        (TokenLimits(8, 1, 1, "cut"), [BOS], RESPONSE, {"cut: prompt": 1}),
        (TokenLimits(5, 3, 1, "cut"), [BOS, 12, 13], [20, 21], {"cut: prompt": 1, "cut: response": 1}),
        (TokenLimits(9, None, 1, "drop"), PROMPT, RESPONSE, {}),
    ],
)
def test_cutting_by_hand(limits, prompt, response, counts):
    assert fit(limits) == ((prompt, [response]), counts)


def test_dropping_a_long_prompt_is_counted_once():
    assert fit(TokenLimits(9, 4, 1, "drop")) == (None, {"dropped: prompt is too long": 1})


def test_one_prompt_before_all_responses():
    fitted, counts = fit(TokenLimits(7, None, 3, "cut"), responses=[[20, EOS], RESPONSE])
    assert fitted == ([BOS, 11, 12, 13], [[20, EOS], [20, 21, 22]])
    assert counts == {"cut: prompt": 1, "cut: response": 1}


IDS = st.lists(st.integers(10, 99), min_size=1, max_size=30)


@given(IDS, st.lists(IDS, min_size=1, max_size=2), st.integers(2, 20), st.integers(1, 19), st.booleans())
def test_whatever_is_cut_obeys_the_limits(prompt, responses, max_length, other, bos):
    other = min(other, max_length - 1)
    prefix = [BOS] if bos else []
    limits = TokenLimits.checked(max_length, None, other, "cut")
    kept, cut = fit_sequences(prefix + prompt, responses, limits, prefix, Counter())

    assert kept[: len(prefix)] == prefix[: len(kept)]
    assert kept[len(prefix) :] == prompt[len(prompt) - (len(kept) - len(prefix)) :] or len(kept) <= len(prefix)
    for ids, response in zip(cut, responses, strict=True):
        assert len(kept) + len(ids) <= max_length
        assert ids == response[: len(ids)]
        assert len(ids) == len(response) or (len(ids) >= other and len(kept) + len(ids) == max_length)


def test_a_prompt_of_two_leading_tokens_keeps_both():
    assert cut_prompt([1, 3, 10, 11, 12], 4, [1, 3]) == [1, 3, 11, 12]
    assert cut_prompt([10, 11, 12], 1, []) == [12]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0, None, None), r"max_length is 0; it must be at least 1"),
        ((8, 0, None), r"max_prompt_length is 0"),
        ((8, None, -1), r"min_response_length is -1"),
        ((8, 8, None), r"max_prompt_length \(8\) must be below max_length \(8\)"),
        ((8, None, 8), r"min_response_length \(8\) must be below max_length \(8\)"),
        ((1, None, None), r"min_response_length \(1\) must be below max_length \(1\)"),
    ],
)
def test_limits_that_do_not_go_together(limits, message):
    with pytest.raises(UserError, match=message):
        TokenLimits.checked(*limits, "cut")


def test_the_context_of_the_model_beside_the_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    check_context(tokenizer, "max_length", 10**6)  # a tokenizer by itself has none
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    loaded = type(tokenizer).from_pretrained(tmp_path)

    check_context(loaded, "max_length", 64)
    with pytest.raises(UserError, match=r"max_length \(65\) is beyond the 64 positions of"):
        check_context(loaded, "max_length", 65)


def test_pairs_made_equal_by_cutting_are_dropped_and_counted():
    encoder = ChatEncoder(tiny_tokenizer())
    pairs = [Pair("how?", "aaaaaaaab", "aaaaaaaac", 0), Pair("how?", "yes", "no", 1)]
    counts = Counter()
    limits = TokenLimits(10, None, 3, "cut")
    kept = list(encode_pairs([(pair, encoder.render(pair.prompt)) for pair in pairs], encoder, limits, counts))

    assert [pair.row_id for pair in kept] == [1]
    assert counts["dropped: chosen and rejected are the same after cutting"] == 1
    assert counts["cut: response"] == 2


def test_duplicates_are_dropped_and_counted():
    prompts = [EncodedPrompt(pack_ids(ids), "", i) for i, ids in enumerate([[1, 2], [1], [1, 2], [2, 1], [1]])]
    counts = Counter()
    assert [prompt.row_id for prompt in drop_duplicates(prompts, counts)] == [0, 1, 3]
    assert counts == {"dropped: prompt is a duplicate": 2}
