"""The scalar head: how it starts, and that a saved reward model says the same in plain transformers."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.models import FAMILIES, WITHOUT_CLASSIFIER, save_folder, table_scalar, tiny_causal_lm, tiny_classifier
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.models.causal_lm import freeze
from rlhf_lightning.models.scalar_lm import (
    Calibration,
    ScalarLM,
    has_reward_head,
    linear_in_float32,
    load_reward_model,
    new_scalar_lm,
)
from rlhf_lightning.models.tokenizer import load_tokenizer, own_pad_token

EOS = 2
ROWS = [[40, 41, 42, 60, 61, EOS], [31, 50, 51, 52, 53, 54, 55], [31, EOS], [44, EOS, 70, EOS]]
"""Ended, cut at its limit, only an EOS, an EOS inside."""


def right_padded(rows, filler):
    width = max(map(len, rows))
    ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])
    return ids, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


def set_pad_token(scalar, tokenizer):
    """What reward training does before it saves."""
    rows = scalar.model.get_input_embeddings().num_embeddings
    pad_id = own_pad_token(tokenizer, rows)
    if pad_id >= rows:
        scalar.model.resize_token_embeddings(pad_id + 1)
    scalar.model.config.pad_token_id = pad_id


@torch.no_grad()
def check_plain_transformers_agrees(folder, raw_scores):
    """Scores of the plain class on the folder, one at a time and all together, padded by its own tokenizer."""
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": ROWS}, return_tensors="pt", padding_side="right")
    together = plain(**batch).logits.squeeze(1)
    alone = torch.stack([plain(torch.tensor([row])).logits[0, 0] for row in ROWS])
    torch.testing.assert_close(together, raw_scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, raw_scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_CLASSIFIER])
@torch.no_grad()
def test_a_saved_reward_model_scores_the_same_in_plain_transformers(tmp_path, family):
    scalar = ScalarLM(tiny_classifier(family))
    raw_scores = scalar.scores(*right_padded(ROWS, filler=9))
    save_folder(tmp_path, scalar.model, tiny_tokenizer())
    check_plain_transformers_agrees(tmp_path, raw_scores)
    torch.testing.assert_close(load_reward_model(tmp_path).scores(*right_padded(ROWS, filler=0)), raw_scores)


# Every family with every pad token and with both sizes, and both sizes with every pad token.
@pytest.mark.parametrize(
    ("family", "pad", "vocab_size"),
    [
        (family, pad, 300 if (i + j) % 2 else 320)
        for i, family in enumerate(["llama", "gpt2", "opt"])
        for j, pad in enumerate(["own", "eos", "none"])
    ],
)
def test_a_new_head_scores_the_same_in_plain_transformers_whatever_the_pad_token_was(tmp_path, family, pad, vocab_size):
    pad_id = {"own": 0, "eos": EOS, "none": None}[pad]
    tokenizer = tiny_tokenizer(pad=pad)
    source = tiny_causal_lm(family, pad_token_id=pad_id, vocab_size=vocab_size)
    folder = save_folder(tmp_path / "sft", source, tokenizer)
    scalar, tokenizer = new_scalar_lm(folder), load_tokenizer(folder)
    set_pad_token(scalar, tokenizer)
    with torch.no_grad():
        raw_scores = scalar.scores(*right_padded(ROWS, filler=0))
    assert raw_scores.std() > 1e-3

    scalar.calibration = Calibration(mean=3.0, std=0.5)
    save_folder(tmp_path / "reward", scalar.model, tokenizer)

    check_plain_transformers_agrees(tmp_path / "reward", raw_scores)
    with torch.no_grad():
        calibrated = load_reward_model(tmp_path / "reward").scores(*right_padded(ROWS, filler=0))
    torch.testing.assert_close(calibrated, (raw_scores - 3.0) / 0.5, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_padding_on_either_side_changes_no_score():
    scalar = ScalarLM(tiny_classifier())
    plain = scalar.scores(*right_padded(ROWS, filler=0))
    ids, mask = right_padded(ROWS, filler=EOS)
    torch.testing.assert_close(scalar.scores(ids, mask), plain)
    left = torch.cat([torch.full((4, 3), 77), ids], dim=1), torch.cat([torch.zeros(4, 3).bool(), mask], dim=1)
    torch.testing.assert_close(scalar.scores(*left), plain)


@torch.no_grad()
def test_the_backbone_of_a_new_scalar_model_is_that_of_the_language_model(tmp_path):
    source = tiny_causal_lm()
    scalar = new_scalar_lm(save_folder(tmp_path, source, tiny_tokenizer()))
    batch = right_padded(ROWS, filler=0)
    assert torch.equal(hidden_states(scalar.model, *batch), hidden_states(source, *batch))


def test_a_new_head_is_drawn_with_the_width_of_the_paper(tmp_path):
    folder = save_folder(tmp_path, tiny_causal_lm(hidden_size=1024, num_hidden_layers=1), tiny_tokenizer())
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        head = new_scalar_lm(folder).model.score
        torch.rand(7)  # what else was drawn does not matter, the seed does
        again = new_scalar_lm(folder).model.score
        torch.manual_seed(1)
        other = new_scalar_lm(folder).model.score
    assert head.bias is None
    assert head.weight.shape == (1, 1024)
    assert head.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    assert abs(head.weight.mean().item()) < 4 / 1025
    assert torch.equal(head.weight, again.weight)
    assert not torch.equal(head.weight, other.weight)


@torch.no_grad()
def test_a_zero_head_has_no_opinion(tmp_path):
    scalar = new_scalar_lm(save_folder(tmp_path, tiny_causal_lm(), tiny_tokenizer()), head="zero")
    assert not scalar(*right_padded(ROWS, filler=0)).any()
    assert scalar.model.score.weight.requires_grad


def test_a_new_head_on_a_reward_model_forgets_its_calibration(tmp_path):
    scalar = ScalarLM(tiny_classifier())
    scalar.calibration = Calibration(mean=1.0, std=2.0)
    folder = save_folder(tmp_path, scalar.model, tiny_tokenizer())
    assert new_scalar_lm(folder).calibration == Calibration()


@torch.no_grad()
def test_calibration_is_kept_in_the_config(tmp_path):
    scalar = ScalarLM(tiny_classifier())
    assert scalar.calibration == Calibration(mean=0.0, std=1.0, probe_ids=[], probe_score=0.0)
    assert scalar.probe_error() == 0.0
    batch = right_padded(ROWS, filler=0)
    raw = scalar.raw(*batch)
    assert torch.equal(scalar(*batch), raw)

    probe_score = scalar.scores(torch.tensor([ROWS[0]]), torch.ones(1, 6).bool()).item()
    scalar.calibration = Calibration(mean=1.5, std=2.0, probe_ids=ROWS[0], probe_score=probe_score)
    assert torch.equal(scalar(*batch), (raw - 1.5) / 2.0)
    assert torch.equal(scalar.raw(*batch), raw)
    save_folder(tmp_path, scalar.model, tiny_tokenizer())
    recorded = json.loads((tmp_path / "config.json").read_text())["reward_calibration"]
    assert recorded == {"mean": 1.5, "std": 2.0, "probe_ids": ROWS[0], "probe_score": probe_score}

    loaded = load_reward_model(tmp_path)
    assert loaded.calibration == scalar.calibration
    assert loaded.probe_error() == pytest.approx(0, abs=1e-6)
    loaded.model.score.weight.mul_(2.0)  # the score doubles; the error is in standard deviations
    assert loaded.probe_error() == pytest.approx(abs(probe_score) / 2.0, rel=1e-4)


def test_dropout_is_off_unless_asked_for(tmp_path):
    folder = save_folder(tmp_path, tiny_classifier(attention_dropout=0.5), tiny_tokenizer())
    batch = right_padded(ROWS, filler=0)
    for dropout in (False, True):
        scalar = load_reward_model(folder, dropout=dropout).train()
        with torch.random.fork_rng([]):
            assert torch.equal(scalar(*batch), scalar(*batch)) is not dropout


def test_freeze_makes_a_constant():
    scalar = ScalarLM(tiny_classifier()).train()
    freeze(scalar)
    assert not scalar.training
    assert not any(p.requires_grad for p in scalar.parameters())


def test_which_folders_have_a_reward_head(tmp_path):
    assert has_reward_head(save_folder(tmp_path / "reward", tiny_classifier(), tiny_tokenizer()))
    assert not has_reward_head(save_folder(tmp_path / "lm", tiny_causal_lm(), tiny_tokenizer()))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_float32_whatever_its_weights_are(autocast, dtype):
    torch.manual_seed(0)
    layer, rows = nn.Linear(16, 1).to(dtype), torch.randn(8, 16).to(dtype)
    expected = rows.float() @ layer.weight.float().T + layer.bias.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = linear_in_float32(layer, rows)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, expected)
    outputs.sum().backward()
    assert layer.weight.grad.dtype == dtype
    torch.testing.assert_close(layer.weight.grad[0].float(), rows.float().sum(dim=0), rtol=1e-2, atol=1e-2)
    assert "forward" not in vars(layer)


def test_scores_that_are_close_do_not_tie_in_bfloat16():
    scalar = table_scalar([5.0, 5.0]).to(torch.bfloat16)
    scalar.model.score = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    scalar.model.score.weight.data.fill_(0.125)
    hidden = torch.tensor([[40.0, 0.0], [40.0, 0.0625]], dtype=torch.bfloat16)
    assert scalar.head(hidden).tolist() == [5.0, 5.0078125]
