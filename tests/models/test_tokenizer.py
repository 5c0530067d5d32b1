"""Loading tokenizers, and the ids that end, fill and pad."""

import json

import pytest

from helpers.models import table_tokenizer
from helpers.templates import shelf_tokenizer
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.eos import eos_ids
from rlhf_lightning.models.tokenizer import filler_id, load_tokenizer, own_pad_token, same_tokenizer


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_a_saved_tokenizer_comes_back_and_no_pad_token_is_invented(tmp_path, pad):
    tokenizer = tiny_tokenizer(pad=pad)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token, loaded.eos_token_id) == (tokenizer.pad_token, 2)
    assert load_tokenizer(loaded) is loaded


def test_missing_tokenizers_are_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, complaint in [
        (tmp_path / "nothing", "does not exist"),
        (tmp_path, "no tokenizer.json; save the tokenizer beside the model"),
        ("nobody/nothing", "no tokenizer could be loaded from 'nobody/nothing'"),
    ]:
        with pytest.raises(UserError, match=complaint) as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)


def test_a_length_that_is_no_number_is_refused_in_one_line(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": "512"}))
    with pytest.raises(UserError, match=r"model_max_length .* is '512', and must be a number"):
        load_tokenizer(tmp_path)


def test_filler_is_the_pad_else_the_eos_else_0():
    assert filler_id(table_tokenizer(pad_id=0)) == 0
    assert filler_id(table_tokenizer(pad_id=3)) == 3
    tokenizer = table_tokenizer(pad_id=None)
    assert filler_id(tokenizer) == 3
    tokenizer.eos_token = None
    assert filler_id(tokenizer) == 0


def test_eos_ids_come_from_tokenizer_and_generation_config():
    tokenizer = table_tokenizer()
    assert eos_ids(tokenizer) == [3]
    assert eos_ids(tokenizer, 3) == [3]
    assert eos_ids(tokenizer, [1, 3]) == [3, 1]
    tokenizer.eos_token = None
    assert eos_ids(tokenizer, 0) == [0]
    with pytest.raises(UserError, match="no EOS token"):
        eos_ids(tokenizer)


def test_the_ends_of_turns_in_the_template_end_responses_too():
    tokenizer = shelf_tokenizer("gemma")
    eos, end = tokenizer.convert_tokens_to_ids(["</s>", "<end_of_turn>"])
    assert eos_ids(tokenizer) == [eos, end]
    assert eos_ids(tokenizer, [end, 7]) == [eos, end, 7]
    assert eos_ids(shelf_tokenizer("zephyr")) == [eos]


def test_a_pad_token_that_is_distinct_is_kept():
    tokenizer = tiny_tokenizer(pad="own")
    assert own_pad_token(tokenizer, 320) == 0


@pytest.mark.parametrize("pad", ["eos", "none"])
def test_a_reserved_token_becomes_the_pad_token(pad):
    tokenizer = tiny_tokenizer(pad=pad)
    size = len(tokenizer)
    assert own_pad_token(tokenizer, 320) == 0
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<|pad|>", 0, size)
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("pad_id", [3, None])
def test_the_unknown_token_is_next(pad_id):
    tokenizer = table_tokenizer(pad_id)
    tokenizer.unk_token = "_"
    assert own_pad_token(tokenizer, 4) == 0
    assert len(tokenizer) == 4


@pytest.mark.parametrize("pad_id", [3, None])
def test_else_a_new_token_follows_the_vocabulary(pad_id):
    tokenizer = table_tokenizer(pad_id)
    assert own_pad_token(tokenizer, 8) == 4
    assert tokenizer.pad_token_id == 4
    assert tokenizer("a").input_ids == [1]


def test_a_pad_token_that_is_the_bos_does_not_count_as_distinct():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.bos_token
    assert own_pad_token(tokenizer, 320) == 0


def test_the_same_tokenizer_with_and_without_a_pad_token():
    plain, padded = table_tokenizer(None), table_tokenizer(None)
    assert same_tokenizer(plain, padded)
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    assert same_tokenizer(plain, padded)
    assert same_tokenizer(padded, plain)


def test_other_ids_or_another_eos_make_another_tokenizer():
    tokenizer = tiny_tokenizer()
    assert not same_tokenizer(tokenizer, table_tokenizer())
    other_end = tiny_tokenizer()
    other_end.eos_token = "<|start|>"
    assert not same_tokenizer(tokenizer, other_end)
    grown = tiny_tokenizer()
    grown.add_tokens(["one", "two"])
    assert not same_tokenizer(tokenizer, grown)
    one_more = tiny_tokenizer()
    one_more.add_tokens(["yeast"])
    assert not same_tokenizer(tokenizer, one_more)  # no pad token
