"""Ids and positions that a model has no row for end in one line."""

import json

import pytest
import torch
from transformers import AutoConfig

from helpers.answers import generate
from helpers.models import VOCAB_SIZE, save_folder, tiny_causal_lm, tiny_classifier
from helpers.prefixes import shared_hidden_states
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.capacity import context_length
from rlhf_lightning.forward.hidden import hidden_states, response_logprobs
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.adapter_folders import folder_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        ("llama", {"max_position_embeddings": 64, "rope_parameters": LINEAR}, 128),
        ("qwen2", {"max_position_embeddings": 32, "rope_parameters": YARN}, 128),
        ("qwen2", {"max_position_embeddings": 256, "rope_parameters": YARN}, 256),
        ("gpt2", {"n_positions": 48}, 48),
        ("gptj", {"n_positions": 48}, 48),
        ("opt", {"max_position_embeddings": 48}, 48),
        ("gpt_neo", {"max_position_embeddings": 48}, 48),
        ("mpt", {"max_seq_len": 48}, 48),
        ("ctrl", {"n_positions": 48}, 48),
        ("falcon", {"alibi": False, "max_position_embeddings": 48}, 48),
        ("falcon", {"alibi": True, "max_position_embeddings": 48}, None),
        ("bloom", {"seq_length": 48}, None),
        ("mamba", {}, None),
        ("xlnet", {}, None),
    ],
)
def test_the_context_under_every_name_that_families_give_it(model_type, options, expected):
    assert context_length(AutoConfig.for_model(model_type, **options)) == expected


def test_the_config_of_a_folder(tmp_path):
    assert folder_config(str(tmp_path)) is None
    assert folder_config("some/hub-id") is None
    unknown = {"model_type": "code_of_its_own", "n_ctx": 32, "auto_map": {"AutoConfig": "x.Y"}}
    (tmp_path / "config.json").write_text(json.dumps(unknown))
    assert context_length(folder_config(str(tmp_path))) == 32  # and no code of the folder is run, nobody is asked
    (tmp_path / "adapter").mkdir()
    said = {"base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    assert context_length(folder_config(str(tmp_path / "adapter"))) == 32


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt-neo", "gpt-j"])
def test_a_text_beyond_the_positions(family):
    model = tiny_causal_lm(family)
    ids = torch.full((1, 70), 40)
    with pytest.raises(UserError, match="a text of 70 tokens is beyond the 64 positions of"):
        hidden_states(model, ids, torch.ones_like(ids).bool())
    ids, sampling = ids[:, :60], Sampling(temperature=0.0, max_new_tokens=9, min_new_tokens=9)
    with pytest.raises(UserError, match="a text of 65 tokens is beyond the 64 positions of"):
        generate(model, ids, torch.ones_like(ids).bool(), sampling, tiny_tokenizer())


@pytest.mark.parametrize("make", [tiny_causal_lm, tiny_classifier])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_id_beyond_the_embeddings(family, make):
    model = make(family)
    ids = torch.tensor([[40, 41, VOCAB_SIZE, 42]])
    mask = torch.ones_like(ids).bool()
    for run in (
        lambda: hidden_states(model, ids, mask),
        lambda: shared_hidden_states(model, ids[:, None], mask[:, None]),
    ):
        with pytest.raises(UserError, match=f"has {VOCAB_SIZE} embeddings but is given the id {VOCAB_SIZE}; its tok"):
            run()
    if make is tiny_causal_lm:
        with pytest.raises(UserError, match="embeddings but is given the id"):
            generate(model, ids, mask, Sampling(max_new_tokens=2), tiny_tokenizer())
        with pytest.raises(UserError, match="embeddings but is given the id"):
            response_logprobs(model, ids, mask, mask[:, 2:])


def test_other_errors_stay_what_they_are(monkeypatch):
    model = tiny_causal_lm()
    ids = torch.tensor([[40, 41]])
    mask = torch.ones_like(ids).bool()
    hidden_states(model, ids, mask)

    def forward(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(model.base_model, "forward", forward)
    with pytest.raises(RuntimeError, match="something else"):
        hidden_states(model, ids, mask)


def test_a_folder_is_what_save_pretrained_writes(tmp_path):
    save_folder(tmp_path, tiny_causal_lm("gpt2"), tiny_tokenizer())
    assert context_length(folder_config(str(tmp_path))) == 64
