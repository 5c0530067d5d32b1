"""Adapters of weights that are no layers: the fused experts of a mixture."""

import warnings
from functools import partial

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from helpers.models import LAYOUTS, save_folder
from helpers.other_families import other_causal_lm
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import FineTune
from rlhf_lightning.algorithms.online.models import ModelSource
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.finetune import choose_trained
from rlhf_lightning.models.lora import adapter_state, add_adapter
from rlhf_lightning.models.merging import merged_adapters, merged_state
from rlhf_lightning.models.sharing import frozen_twin
from rlhf_lightning.models.written_folders import write_adapter

IDS = torch.tensor([[40, 41, 42, 43, 44]])
MASK = torch.ones_like(IDS).bool()
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LORA = FineTune("lora", rank=2, target_parameters=EXPERTS)


pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("mixtral"), other_causal_lm("mixtral").double(), tiny_tokenizer())


def adapted(folder, finetune=LORA):
    """A model with adapters that do something."""
    model = load_causal_lm(folder)
    choose_trained(model, finetune)
    add_adapter(model, finetune)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return model


def logits(model):
    model.set_experts_implementation("eager")  # torch multiplies experts in groups in float32 only
    with torch.no_grad():
        return model(IDS).logits


def test_adapters_start_at_nothing_and_experts_learn(folder):
    model, base = load_causal_lm(folder), load_causal_lm(folder)
    choose_trained(model, LORA)
    twin = frozen_twin(model)
    add_adapter(model, LORA)
    assert torch.equal(logits(model), logits(base))
    hidden_states(model, IDS, MASK).square().sum().backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".lora_")[0].split(".")[-1] for name in learnt} >= {"q_proj", "experts", "base_layer"}
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)
    assert torch.equal(logits(twin), logits(base))  # which shares the experts


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # whose experts are [out, in] and [in, out]
@pytest.mark.parametrize("targets", [LORA, FineTune("lora", rank=2, target_modules=[], target_parameters=EXPERTS[:1])])
def test_what_is_exported_says_what_was_trained(tmp_path, targets, family):
    folder = save_folder(tmp_path / "base", other_causal_lm(family).double(), tiny_tokenizer())
    model = adapted(folder, targets)
    assert (logits(model) - logits(load_causal_lm(folder))).abs().max() > 0.1
    load_causal_lm(folder).save_pretrained(tmp_path / "m", state_dict=merged_state(model, model.state_dict()))
    for load in (load_causal_lm, partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float64)):
        torch.testing.assert_close(logits(load(tmp_path / "m")), logits(model), **LAYOUTS)

    (tmp_path / "a").mkdir()
    write_adapter(model, adapter_state(model, model.state_dict()), folder, tmp_path / "a")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), tmp_path / "a")
    for loaded in (plain, load_causal_lm(tmp_path / "a")):
        torch.testing.assert_close(logits(loaded), logits(model), **LAYOUTS)


def test_merging_for_a_while_leaves_them_as_they_are(folder):
    model = adapted(folder)
    before, state = logits(model), {name: p.clone() for name, p in model.state_dict().items()}
    with merged_adapters(model):
        torch.testing.assert_close(logits(model), before, **LAYOUTS)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())


def test_ppo_shares_the_base(folder):
    source = ModelSource(folder, "helpers.stages.share_of_letters", finetune=LORA, value_trunk="policy")
    models = source.load(ChatEncoder(tiny_tokenizer()))
    assert torch.equal(logits(models.policy), logits(models.reference))
    tables = [
        {id(p) for name, p in m.named_parameters() if "experts" in name and "lora" not in name} for m in models[:2]
    ]
    assert tables[0] == tables[1]


def test_what_stays_frozen_is_said(folder):
    with pytest.warns(UserWarning, match=r"leaves \d\d% of the weights .*experts.down_proj, experts.gate_up_proj"):
        adapted(folder, FineTune("lora", rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(folder, FineTune("lora", rank=2, target_parameters=[*EXPERTS, "gate.weight"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["gate_up_proj"]}, "is not a layer but a weight .*name it in finetune.target_parameters"),
        (
            {"target_parameters": ["nothing"]},
            "no weight is called 'nothing'; there are experts.down_proj, experts.gate",
        ),
        ({"target_parameters": ["q_proj.weight"]}, "q_proj.weight' belongs to a layer"),
        ({"target_parameters": EXPERTS, "dropout": 0.1}, "neither use_dora nor dropout"),
        ({"target_parameters": EXPERTS, "use_dora": True}, "neither use_dora nor dropout"),
    ],
)
def test_mistakes_are_named(folder, options, message):
    with pytest.raises(UserError, match=message):
        adapted(folder, FineTune("lora", rank=2, **options))
