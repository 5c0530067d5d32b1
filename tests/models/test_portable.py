"""Folders for older tools: what transformers 4.51 needs stands in them, and transformers 5 reads them as before.

`make test-exports` opens them with 4.51.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer

from helpers.exported import FAMILIES, TOKENIZERS, config_of, more_tokens
from helpers.opened import DIALOGUE, TEXTS
from helpers.tokenizers import Slow
from rlhf_lightning.cli.quickstart.toy import write_toy_model
from rlhf_lightning.models.portable import older_config, older_tokenizer, rewrite_config, save_tokenizer


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_reads_the_same_config_with_the_older_names_beside_its_own(family, tmp_path):
    config = config_of(family)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    rewrite_config(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    if family == "phi3-long":
        assert after["rope_parameters"].pop("type") == "longrope"  # as every Phi-3 of the hub says it
    for name, value in before.to_dict().items():
        assert name in after
        assert after[name] == value, name
    assert read(tmp_path / "config.json")["torch_dtype"] == "bfloat16"


_SCALING_OF_LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("family", "older"),
    [
        # 4.51 finds no base in rope_parameters, and takes 10,000.
        ("llama", {"rope_theta": 300.0}),
        ("llama-3", {"rope_theta": 300.0, "rope_scaling": _SCALING_OF_LLAMA_3}),
        # Its YaRN takes the quotient of max_position_embeddings and the original ones for the factor, where both stand.
        ("qwen2-yarn-over-all", {"rope_theta": 300.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        ("stablelm", {"rope_theta": 300.0, "partial_rotary_factor": 0.5}),
        ("gpt-neox", {"rotary_emb_base": 300.0, "rotary_pct": 0.5}),
        ("gemma3", {"rope_theta": 300.0, "rope_local_base_freq": 50.0, "sliding_window_pattern": 2}),
        # It refuses a rope_scaling of Phi-3 that has another key.
        (
            "phi3-long",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8}},
        ),
        ("qwen3-moe", {"num_experts": 4}),
    ],
)
def test_settings_stand_under_the_names_that_transformers_4_51_reads(family, older):
    config = config_of(family).to_dict()
    written = older_config(config)
    assert {name: written[name] for name in older} == older
    assert {name: written[name] for name in config} == config


def test_without_scaling_none_is_written():
    assert "rope_scaling" not in older_config(config_of("llama").to_dict())


@pytest.mark.parametrize("config", [{}, {"rope_parameters": {}}, {"model_type": "own", "layer_types": None}])
def test_a_config_of_somebodys_own_stays_as_it_is(config):
    assert older_config(config) == config


def test_infinity_is_written_as_transformers_4_51_reads_it(tmp_path):
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, {"__float__": "Infinity"}]}')
    rewrite_config(tmp_path)
    assert '"time_step_limit": [\n    0.0,\n    Infinity\n' in (tmp_path / "config.json").read_text()


def llama() -> LlamaTokenizer:
    """One that puts no BOS; in 4.51 its class puts one whatever `tokenizer.json` says."""
    vocab = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127)), *(f"<0x{i:02X}>" for i in range(256))]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[], add_bos_token=False)


@pytest.mark.parametrize("make", [*TOKENIZERS.values(), more_tokens, llama], ids=[*TOKENIZERS, "more", "llama"])
def test_a_tokenizer_is_read_as_it_was_under_a_class_that_4_51_knows(make, tmp_path):
    tokenizer = make()
    save_tokenizer(tokenizer, tmp_path)
    config, loaded = read(tmp_path / "tokenizer_config.json"), AutoTokenizer.from_pretrained(tmp_path)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert loaded(TEXTS).data == tokenizer(TEXTS).data
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    assert (loaded.padding_side, loaded.truncation_side) == (tokenizer.padding_side, tokenizer.truncation_side)
    if tokenizer.chat_template:
        assert loaded.apply_chat_template(DIALOGUE) == tokenizer.apply_chat_template(DIALOGUE)


def test_what_a_class_of_4_51_would_decide_is_written_down(tmp_path):
    save_tokenizer(more_tokens(), tmp_path)
    config = read(tmp_path / "tokenizer_config.json")
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # otherwise token_type_ids, too
    assert config["additional_special_tokens"] == ["<a>", "<b>"]
    assert "extra_special_tokens" not in config  # a list of which 4.51 fails on
    assert (config["padding_side"], config["truncation_side"]) == ("left", "left")
    assert config["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize("config", [{"tokenizer_class": "Slow"}, {"tokenizer_class": "Own", "auto_map": {}}])
def test_a_class_that_is_code_of_its_own_keeps_its_name(config):
    tokenizer = Slow() if "auto_map" not in config else more_tokens()
    assert older_tokenizer(config, tokenizer)["tokenizer_class"] == config["tokenizer_class"]


def test_the_quickstarts_model_opens_there_too(tmp_path):
    write_toy_model(tmp_path, more_tokens())
    assert (
        read(tmp_path / "config.json")["rope_theta"]
        == AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"]
    )
    assert read(tmp_path / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
