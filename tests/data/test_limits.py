import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import InstructionDataModule
from rlhf_lightning.cli.prepare import prepare
from rlhf_lightning.data.fitting import check_context
from rlhf_lightning.data.limits import TokenLimits, cut_prompt
from rlhf_lightning.errors import UserError

BOS = 1


@pytest.mark.parametrize(
    ("limits", "responses", "room"),
    [
        (TokenLimits(10, None, 4, "cut"), [2], 8),  # the response needs no more
        (TokenLimits(10, None, 4, "cut"), [9], 6),  # and is promised no more
        (TokenLimits(10, None, 4, "cut"), [2, 3], 7),  # one prompt before all responses
        (TokenLimits(10, 5, 4, "cut"), [2], 5),
        (TokenLimits(10, 9, 4, "cut"), [9], 6),
        (TokenLimits(10, None, 4, "cut"), [], 6),
        (TokenLimits(8, 7, 1, "cut"), [], 7),  # for prompts that come alone
    ],
)
def test_the_room_of_a_prompt(limits, responses, room):
    assert limits.prompt_room(responses) == room


@pytest.mark.parametrize(
    ("ids", "turns", "room", "prefix", "kept", "kept_turns"),
    [
        ([1, 10, 11, 12, 13], [1, 2, 3, 5], 5, [1], [1, 10, 11, 12, 13], [1, 2, 3, 5]),
        ([1, 10, 11, 12, 13], [1, 2, 3, 5], 4, [1], [1, 11, 12, 13], [2, 4]),  # the first turn is gone
        ([1, 10, 11, 12, 13], [1, 3, 4, 5], 4, [1], [1, 11, 12, 13], [1, 2, 3, 4]),  # one token of it is
        ([1, 10, 11, 12, 13], [1, 5], 2, [1], [1, 13], [1, 2]),
        ([1, 10, 11, 12, 13], [1, 5], 1, [1], [1], []),
        ([1, 3, 10, 11, 12], [2, 3], 4, [1, 3], [1, 3, 11, 12], []),  # two leading tokens
        ([10, 11, 12], [0, 3], 1, [], [12], [0, 1]),
    ],
)
def test_cutting_by_hand(ids, turns, room, prefix, kept, kept_turns):
    cut = cut_prompt(np.array(ids, np.int32), np.array(turns, np.int32), room, prefix)
    assert [part.tolist() for part in cut] == [kept, kept_turns]
    assert [part.dtype for part in cut] == [np.int32, np.int32]


@given(st.data(), st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_what_is_left_is_the_end_with_its_turns(data, length, room, bos):
    prefix = [BOS] if bos else []
    ids = np.array([*prefix, *range(100, 100 + length)])
    edges = sorted(data.draw(st.sets(st.integers(len(prefix), len(ids)), max_size=6)))
    turns = np.array(edges[: len(edges) // 2 * 2], dtype=np.int32)
    cut, left = cut_prompt(ids, turns, room, prefix)

    assert len(cut) == min(len(ids), room)
    assert cut.tolist() == [*prefix, *ids[len(prefix) :][-max(0, len(cut) - len(prefix)) or len(ids) :]][: len(cut)]
    said = {token for a, b in turns.reshape(-1, 2) for token in ids[a:b]}
    assert {token for a, b in left.reshape(-1, 2) for token in cut[a:b]} == said & set(cut.tolist())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0, None, None, "cut"), r"max_length \(0\) must be at least 1"),
        ((8, 0, None, "cut"), r"max_prompt_length \(0\) must be at least 1"),
        ((8, None, -1, "cut"), r"response_room \(-1\) must be at least 1"),
        ((8, 8, None, "cut"), r"max_prompt_length \(8\) must be below max_length \(8\)"),
        ((8, None, 8, "cut"), r"response_room \(8\) must be below max_length \(8\)"),
        ((1, None, None, "cut"), r"response_room \(1\) must be below max_length \(1\)"),
        ((8, None, None, "cut", 8), r"minimum_response_length \(8\) must be below max_length \(8\)"),
        ((8, None, None, "cut", -1), r"minimum_response_length \(-1\) must be at least 0"),
    ],
)
def test_limits_that_do_not_go_together(limits, message):
    with pytest.raises(UserError, match=message):
        TokenLimits(*limits)


def test_a_quarter_is_kept_for_the_response_unasked():
    assert TokenLimits(512).kept_room == TokenLimits(512, None, 128).kept_room == 128
    assert TokenLimits(512).prompt_room([500]) == TokenLimits(512).prompt_room([]) == 384


def test_the_context_of_the_model_beside_the_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    check_context(tokenizer, "max_length", 10**6)  # a tokenizer by itself has none
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    loaded = type(tokenizer).from_pretrained(tmp_path)

    check_context(loaded, "max_length", 64)
    with pytest.raises(UserError, match=r"max_length \(65\) is beyond the 64 positions of"):
        check_context(loaded, "max_length", 65)


def test_gpt_2_calls_its_context_otherwise(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 64}))
    with pytest.raises(UserError, match=r"max_length \(65\) is beyond the 64 positions of"):
        check_context(type(tiny_tokenizer()).from_pretrained(tmp_path), "max_length", 65)


@pytest.fixture
def beyond(tmp_path):
    """A model's folder whose tokenizer has two tokens more than the model has embeddings; a row with the first."""
    tokenizer = tiny_tokenizer()
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    tokenizer.add_tokens(["<tool>", "<other>"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


REFUSAL = r"the data hold the token '<tool>' \(id \d+\), but the model of .* has \d+ embeddings; .*resize_token_embed"
NAMED = [{"prompt": "call", "response": f"{i} <tool>"} for i in range(4)]
HARMLESS = [{"prompt": "call", "response": f"{i}"} for i in range(4)]


def test_data_with_a_token_that_the_model_lacks_are_refused(beyond, tmp_path):
    data = InstructionDataModule(beyond, NAMED, max_length=64, cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match=REFUSAL):
        data.setup("fit")
    with pytest.raises(UserError, match=REFUSAL):
        prepare(tmp_path / "out", beyond, NAMED, max_length=64)
    assert not (tmp_path / "out").exists()


def test_tokens_that_nothing_uses_are_no_obstacle(beyond, tmp_path):
    InstructionDataModule(beyond, HARMLESS, max_length=64, cache_dir=tmp_path / "cache").setup("fit")
    prepare(tmp_path / "out", beyond, HARMLESS, max_length=64)
