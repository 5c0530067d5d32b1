"""Which weights are trained, and gradient checkpointing."""

import re

import pytest
import torch

from helpers.lora import LORA, adapted, stirred, trained
from helpers.models import FAMILIES, WITHOUT_CLASSIFIER, tiny_causal_lm, tiny_classifier
from rlhf_lightning import FineTune, UserError
from rlhf_lightning.forward.hidden import hidden_states, padded_hidden_states
from rlhf_lightning.models.causal_lm import disable_dropout
from rlhf_lightning.models.finetune import choose_trained, describe_trained, prepare_for_training

IDS = torch.tensor([[40, 41, 42, 43, 44]])
FEW = ["llama", "gpt-neox", "gpt2", "opt"]


def test_all_is_all():
    model = tiny_causal_lm().requires_grad_(False)
    prepare_for_training(model, FineTune())
    assert len(trained(model)) == len(list(model.parameters()))


LAST = {
    "llama": {"model.norm.weight", "lm_head.weight"},
    "gpt-neox": {"gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias", "lm_head.weight"},
    "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    "opt": {"model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"},
    "bloom": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
}
"""What `last_layer` trains besides the second of two blocks; a head that is tied to the embeddings stays frozen."""


@pytest.mark.parametrize("family", LAST)
def test_the_last_layer_is_the_last_block_the_final_norm_and_the_untied_head(family):
    model = tiny_causal_lm(family)
    choose_trained(model, FineTune("last_layer"))
    in_block = {name for name in trained(model) if re.search(r"\.(layers|h)\.1\.", name)}
    assert in_block == {name for name, _ in model.named_parameters() if re.search(r"\.(layers|h)\.1\.", name)}
    assert trained(model) - in_block == LAST[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embeddings_are_never_dragged_into_the_last_layer(family):
    model = tiny_causal_lm(family)
    choose_trained(model, FineTune("last_layer"))
    assert not any(p.requires_grad for p in model.get_input_embeddings().parameters())
    head = model.get_output_embeddings().weight
    assert head.requires_grad is (head is not model.get_input_embeddings().weight)
    assert any(".1." in name for name in trained(model))


@pytest.mark.parametrize("mode", ["last_layer", "lora"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_CLASSIFIER])
def test_the_head_of_a_classifier_is_trained(family, mode):
    model = adapted(tiny_classifier(family), FineTune(mode))
    assert type(model.score) is torch.nn.Linear
    assert "score.weight" in trained(model)
    if mode == "lora":
        assert all("lora" in name for name in trained(model) - {"score.weight"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "some"}, "mode 'some' is unknown; use all, last_layer or lora"),
        ({"mode": "lora", "export": "zip"}, "export 'zip' is unknown; use merged or adapter"),
        ({"export": "adapter"}, "export adapter needs finetune.mode lora, not all"),
        ({"rank": 0}, r"rank \(0\) must be at least 1"),
        ({"alpha": 0}, r"alpha \(0\) must be above 0"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression"),
    ],
)
def test_settings_that_make_no_sense(wrong, message):
    with pytest.raises(UserError, match=f"finetune.{message}"):
        FineTune(**wrong)


@pytest.mark.parametrize("mode", ["all", "last_layer", "lora"])
@pytest.mark.parametrize("family", FEW)
def test_gradient_checkpointing_changes_memory_only(family, mode, recwarn):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_causal_lm(family)
        prepare_for_training(model, FineTune(mode, rank=2), checkpointing)
        stirred(model).train()
        disable_dropout(model)
        hidden_states(model, IDS, torch.ones_like(IDS).bool()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-6)
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


def test_gradient_checkpointing_runs_each_block_twice():
    counts = []
    for checkpointing in (False, True):
        model, seen = tiny_causal_lm().train(), []
        prepare_for_training(model, FineTune(), checkpointing)
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        padded_hidden_states(model, IDS, torch.ones_like(IDS).bool()).sum().backward()
        counts.append(len(seen))
    assert counts == [1, 2]


def test_one_line_says_what_is_trained():
    model = adapted(tiny_causal_lm())
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert describe_trained(model, LORA) == f"training {size / 1000:.1f} k of 17.0 k parameters (lora, rank 4)"
    tied = tiny_causal_lm("gpt2")
    assert describe_trained(tied, FineTune()).split(" parameters")[0] == "training 12.7 k of 12.7 k"
