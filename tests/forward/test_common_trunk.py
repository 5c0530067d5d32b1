"""What two models have in common is run once, and both say what each says by itself."""

import pytest
import torch

from helpers.models import FAMILIES, tiny_causal_lm
from helpers.stages import fit, prompt_rows, save_llama, save_reward_model, sgd, weights
from rlhf_lightning import PPOModule, PromptDataModule, RLOOModule, Sampling
from rlhf_lightning.algorithms.online import rollout
from rlhf_lightning.forward.common_trunk import common_trunk, have_common_trunk
from rlhf_lightning.forward.compiled_layers import compiled_layers
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.models.finetune import choose_trained
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.sharing import frozen_twin
from rlhf_lightning.training.sharded import blocks_of

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [0, 0, 0, 15, 16, 17]])
MASK = IDS > 0


def pair(family, mode="last_layer"):
    """A policy whose last block was trained, and its reference."""
    policy = tiny_causal_lm(family).eval()
    choose_trained(policy, FineTune(mode=mode))
    reference = frozen_twin(policy)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    return policy, reference


def calls(model):
    """Numbers of blocks, as their parts are called."""
    found = []
    for place, block in enumerate(blocks_of(model)):
        for part in block.children():
            part.register_forward_hook(lambda *_, place=place: found.append(place))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_model_runs_its_own_blocks_alone_and_says_the_same(family):
    policy, reference = pair(family)
    assert have_common_trunk(policy, reference)
    expected = [hidden_states(model, IDS, MASK).detach() for model in (policy, reference)]
    assert not torch.equal(*expected)
    called = calls(reference)
    with common_trunk(policy, reference):
        found = [hidden_states(model, IDS, MASK) for model in (policy, reference)]
    assert all(map(torch.equal, found, expected))
    assert set(called) == {1}
    assert torch.equal(hidden_states(reference, IDS, MASK), expected[1])  # all is as it was
    assert set(called) == {0, 1}


def test_other_sequences_are_run_as_ever():
    policy, reference = pair("llama")
    other, few = IDS.flip(0), IDS[:2]
    with common_trunk(policy, reference):
        hidden_states(policy, IDS, MASK)
        found = [hidden_states(reference, ids, ids > 0) for ids in (other, few, IDS)]
    expected = [hidden_states(reference, ids, ids > 0) for ids in (other, few, IDS)]
    assert all(map(torch.equal, found, expected))


def test_the_same_tokens_with_other_borders_are_run_as_ever():
    policy, reference = pair("llama")
    ids = torch.tensor([[5, 6, 7, 8, 0, 0, 0, 0], [9, 10, 11, 12, 13, 14, 15, 16]])
    other = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 0, 0, 0, 0]])
    expected = hidden_states(reference, other, other > 0)
    with common_trunk(policy, reference):
        hidden_states(policy, ids, ids > 0)
        assert torch.equal(hidden_states(reference, other, other > 0), expected)


def test_models_that_differ_from_the_first_block_on_have_nothing_in_common():
    policy, reference = pair("llama", "all")
    assert not have_common_trunk(policy, reference)
    assert not have_common_trunk(policy, policy)
    assert not have_common_trunk(policy, pair("llama")[1])  # equal weights, but not the same ones
    assert not have_common_trunk(policy, None)


def test_a_model_that_would_say_something_else_is_run_by_itself():
    policy, reference = pair("llama")
    blocks_of(reference)[0].input_layernorm.variance_epsilon = 10.0  # no weight tells
    assert not have_common_trunk(policy, reference)


def test_compiled_layers_run_for_themselves():
    policy, reference = pair("llama")
    with compiled_layers(policy):
        assert not have_common_trunk(policy, reference)
    assert have_common_trunk(policy, reference)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    lm = save_llama(tmp_path_factory.mktemp("lm"))
    return lm, save_reward_model(tmp_path_factory.mktemp("reward"), lm)


@pytest.mark.parametrize(
    ("kind", "options", "shared"),
    [
        (PPOModule, {"reuse_logprobs": False}, ["policy", "value"]),
        (PPOModule, {}, ["value"]),  # the policy is not run in scoring
        (PPOModule, {"value_trunk": "policy", "reuse_logprobs": False}, ["policy"]),
        (RLOOModule, {"samples_per_prompt": 2, "reuse_logprobs": False}, ["policy"]),
    ],
)
def test_a_run_is_the_same_with_and_without(folders, kind, options, shared, monkeypatch):
    found, pairs = [], []
    for shares in (True, False):

        def asked(first, second, shares=shares):
            common = shares and have_common_trunk(first, second)
            pairs.append(type(first).__name__) if common else None
            return common

        monkeypatch.setattr(rollout, "have_common_trunk", asked)
        module = kind(
            *folders,
            finetune=FineTune(mode="last_layer"),
            rollout_batch_size=4,
            minibatch_size=4,
            micro_batch_size=2,
            sampling=Sampling(max_new_tokens=6),
            optimizer=sgd(0.1),
            lr_schedule="constant",
            **options,
        )
        limits = {"rollout_batch_size": 4, "validation_split": 0.0, "max_prompt_length": 40}
        data = PromptDataModule(folders[0], prompt_rows(8), **limits)
        log = fit(module, data)
        series = {name: log.series(f"train/{name}") for name in ("score", "kl", "loss", "policy_loss")}
        found.append((series, weights(module.policy)))
    assert pairs == 2 * [
        "LlamaForCausalLM" if name == "policy" else "LlamaForSequenceClassification" for name in shared
    ]
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1].values(), found[1][1].values()))
