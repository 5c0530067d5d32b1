"""Every row of the embeddings learns, the EOS of a model that pads with it too."""

import pytest
import torch
from torch import nn

from helpers.models import VOCAB_SIZE, save_folder, tiny_causal_lm, tiny_classifier
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import FineTune, PPOModule, RewardModule, SFTModule
from rlhf_lightning.forward.hidden import hidden_states, response_logprobs
from rlhf_lightning.forward.output_layer import cross_entropy_at
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.scalar_lm import load_reward_model, new_scalar_lm, response_values

EOS = 2
# The EOS is read in the middle, ends both rows, and is the id of the padding. (Padding on the left would be NaN in
# float64 where attention is "eager": transformers takes its softmax in float32, where the least float64 is infinite.)
IDS = torch.tensor([[40, 41, 50, EOS, EOS, EOS], [60, EOS, 62, 63, 64, EOS]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
FAMILIES = ["llama", "qwen3", "gpt-neox", "opt", "opt-350m-like", "gemma", "gemma2", "stablelm", "bloom", "phi"]


def by_turns(*choices):
    """Each family with one choice or the other, and two families with both."""
    return [(name, choices[i % 2]) for i, name in enumerate([*FAMILIES, FAMILIES[1], FAMILIES[0]])]


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def save_padding_by_eos(folder, model):
    """Write a model's folder whose pad id is its EOS; returns the model, which has no `padding_idx`."""
    model.config.pad_token_id = EOS
    save_folder(folder, model, tiny_tokenizer(pad="eos"))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(model, loss, plain, expected):
    found, right = gradients(model, loss), gradients(plain, expected)
    table = next(name for name, p in plain.named_parameters() if p is plain.get_input_embeddings().weight)
    assert found.keys() == right.keys()
    for name, gradient in right.items():  # many families normalise in float32
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert found[table][EOS].norm() > 1e-3
    assert model.config.pad_token_id == EOS  # what is exported says what it said


def apart():
    return [ids[mask].unsqueeze(0) for ids, mask in zip(IDS, MASK, strict=True)]


def predictions(plain):
    """Logits and the tokens that follow, of each row alone."""
    return [(plain(row).logits[0, :-1], row[0, 1:]) for row in apart()]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("family", "tied"), by_turns(True, False))
def test_a_language_model_s_gradients_are_those_without_a_padding_idx(tmp_path, family, tied):
    plain = save_padding_by_eos(tmp_path, tiny_causal_lm(family, tie_word_embeddings=tied))
    model = load_causal_lm(tmp_path)
    loss, _ = cross_entropy_at(model, hidden_states(model, IDS, MASK)[:, :-1], IDS[:, 1:], MASK[:, 1:])
    expected = sum(nn.functional.cross_entropy(*pair, reduction="sum") for pair in predictions(plain))
    assert_gradients(model, loss, plain, expected)

    logprobs, _ = response_logprobs(model, IDS, MASK, MASK[:, 2:])  # of PPO, prompts of two tokens
    expected = sum(logit.log_softmax(-1)[1:].gather(1, ids[1:, None]).sum() for logit, ids in predictions(plain))
    assert_gradients(model, logprobs.double().sum(), plain, expected)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("family", "load"), by_turns(load_reward_model, new_scalar_lm))
def test_a_scalar_model_s_gradients_are_those_without_a_padding_idx(tmp_path, family, load):
    plain = save_padding_by_eos(tmp_path, tiny_classifier(family))
    scalar = load(tmp_path)
    plain.score.load_state_dict(scalar.model.score.state_dict())

    def scores(row):  # the head computes in float32
        hidden = plain.base_model(row).last_hidden_state.float()
        return hidden @ plain.score.weight.float().T

    loss = torch.where(MASK, scalar.raw(IDS, MASK), 0).sum()
    assert_gradients(scalar.model, loss, plain, sum(scores(row).sum() for row in apart()))
    values = response_values(scalar, IDS, MASK, MASK[:, 2:]).sum()
    assert_gradients(scalar.model, values, plain, sum(scores(row)[:, 1:-1].sum() for row in apart()))


def paddings(module):
    return {m.padding_idx for m in module.modules() if isinstance(m, nn.Embedding)}


@pytest.mark.parametrize("finetune", [FineTune(), FineTune("last_layer"), FineTune("lora", rank=2)])
def test_no_embedding_of_any_stage_has_a_padding_idx(tmp_path, finetune):
    lm, reward = str(tmp_path / "lm"), str(tmp_path / "reward")
    save_padding_by_eos(tmp_path / "lm", tiny_causal_lm())
    save_padding_by_eos(tmp_path / "reward", tiny_classifier())
    grown = save_padding_by_eos(tmp_path / "grown", tiny_causal_lm(vocab_size=len(tiny_tokenizer())))
    stages = [SFTModule(lm, finetune=finetune), RewardModule(lm, finetune=finetune)]
    stages += [RewardModule(str(tmp_path / "grown"), finetune=finetune)]  # resized for a pad token of its own
    stages += [PPOModule(lm, reward, finetune=finetune), PPOModule(lm, reward, value_trunk="policy", finetune=finetune)]
    stages += [PPOModule(lm, "helpers.stages.share_of_letters", finetune=finetune)]
    for stage in stages:
        stage.configure_model()
        assert paddings(stage) == {None}
    assert stages[2].export_model.get_input_embeddings().num_embeddings <= VOCAB_SIZE
    assert grown.config.pad_token_id == stages[0].export_model.config.pad_token_id == EOS
