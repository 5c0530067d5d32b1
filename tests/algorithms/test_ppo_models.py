"""The four models of PPO: what they compute, and what they share."""

import copy

import pytest
import torch
from torch import nn

from helpers.models import save_folder, tiny_causal_lm
from helpers.stages import same_weights, save_gpt2, save_llama, save_reward_model, share_of_letters, weights
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.algorithms.online.models import ModelSource, TrunkValue, logprobs_and_values, values_alone
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import response_logprobs
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.finetune import choose_trained
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.scalar_lm import load_reward_model, new_scalar_lm, response_values
from rlhf_lightning.models.sharing import frozen_twin, scalar_beside

LORA = FineTune(mode="lora", rank=4)
IDS = torch.tensor([[0, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 0]])
MASK = torch.tensor([[False, True, True, True, True, True], [True, True, True, True, True, False]])
ANSWERED = torch.tensor([[True, True, True], [True, True, False]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reward_folder(folder, tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward"), folder)


def load(folder, reward, **settings):
    return ModelSource(folder, reward, **settings).load(ChatEncoder(tiny_tokenizer()))


def storages(*modules):
    """Bytes of each distinct piece of memory that the parameters lie in."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
    return sum(found.values())


def disturb(model):
    """Move everything that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def values_of(scalar):
    return response_values(scalar, IDS, MASK, ANSWERED)


def logprobs_of(model):
    return response_logprobs(model, IDS, MASK, ANSWERED)[0]


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("mode", ["all", "last_layer", "lora"])
def test_models_start_as_their_folders_and_the_frozen_ones_stay_so(folder, reward_folder, mode):
    models = load(folder, reward_folder, finetune=FineTune(mode=mode))
    plain, reward = load_causal_lm(folder), load_reward_model(reward_folder)
    for policy in (models.policy, models.reference):
        torch.testing.assert_close(logprobs_of(policy), logprobs_of(plain), atol=1e-6, rtol=0)
    for scalar in (models.value, models.scorer.model):
        torch.testing.assert_close(values_of(scalar), values_of(reward), atol=1e-6, rtol=0)
    disturb(models.policy)
    disturb(models.value)
    assert (logprobs_of(models.policy) - logprobs_of(plain)).abs().max() > 1e-3
    assert (values_of(models.value) - values_of(reward)).abs().max() > 1e-3
    torch.testing.assert_close(logprobs_of(models.reference), logprobs_of(plain), atol=1e-6, rtol=0)
    torch.testing.assert_close(values_of(models.scorer.model), values_of(reward), atol=1e-6, rtol=0)
    assert not any(p.requires_grad for frozen in (models.reference, models.scorer) for p in frozen.parameters())


def test_what_is_frozen_is_held_once(folder, reward_folder):
    base, reward = storages(load_causal_lm(folder)), storages(load_reward_model(reward_folder))

    def held(mode):
        models = load(folder, reward_folder, finetune=FineTune(mode=mode, rank=1))
        return storages(*(part for part in models if part is not None))

    assert held("all") == 2 * base + 2 * reward
    assert held("last_layer") < 1.6 * (base + reward)  # one block of two twice, the embeddings once
    assert held("lora") < 1.1 * (base + reward)


@pytest.mark.usefixtures("double_precision")
def test_a_reward_adapter_on_the_policys_base_makes_one_base_carry_all_four(folder, tmp_path):
    trained = new_scalar_lm(folder)
    choose_trained(trained.model, LORA)
    add_adapter(trained.model, LORA)
    disturb(trained.model)
    adapter = save_adapter(trained, folder, tmp_path / "reward")

    models = load(folder, adapter, finetune=LORA)
    assert not any(learns_nothing_of_padding(model) for model in (models.policy, models.value, models.scorer))
    for scalar in (models.value, models.scorer.model):
        torch.testing.assert_close(values_of(scalar), values_of(trained), atol=1e-6, rtol=0)
    assert storages(*models) < 1.5 * storages(load_causal_lm(folder))
    disturb(models.value)
    disturb(models.policy)
    torch.testing.assert_close(values_of(models.scorer.model), values_of(trained), atol=1e-6, rtol=0)
    torch.testing.assert_close(logprobs_of(models.reference), logprobs_of(load_causal_lm(folder)), atol=1e-6, rtol=0)


def learns_nothing_of_padding(model):
    return any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in model.modules())


def save_adapter(scalar, base, folder):
    """The folder that plain PEFT writes of an adapter and a head."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    adapted = get_peft_model(plain, config)
    state = {f"base_model.model.{name}": tensor for name, tensor in scalar.model.state_dict().items() if "lora" in name}
    adapted.load_state_dict(state, strict=False)
    adapted.base_model.model.score.modules_to_save["default"].load_state_dict(scalar.model.score.state_dict())
    adapted.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_beside_a_function_the_value_model_says_0(folder):
    for finetune in (FineTune(), LORA):
        models = load(folder, share_of_letters, finetune=finetune)
        assert not values_of(models.value).any()
    assert storages(models.policy, models.reference, models.value) < 1.6 * storages(load_causal_lm(folder))


def test_the_head_is_as_wide_as_what_the_policys_own_head_reads(tmp_path):
    folder = save_folder(tmp_path, tiny_causal_lm("opt-350m-like"), tiny_tokenizer())  # hidden size 16, projected to 12
    models = load(folder, share_of_letters, value_trunk="policy")
    assert models.value.score.in_features == 12
    assert not values_alone(models.policy, models.value, IDS, MASK, ANSWERED).any()


def test_a_head_on_the_policys_trunk_needs_no_second_pass(folder, reward_folder):
    models = load(folder, reward_folder, value_trunk="policy")
    assert isinstance(models.value, TrunkValue)
    assert not values_alone(models.policy, models.value, IDS, MASK, ANSWERED).any()
    disturb(models.value)

    passes = []
    models.policy.base_model.register_forward_hook(lambda *_: passes.append(1))
    logprobs, entropies, values = logprobs_and_values(models.policy, models.value, IDS, MASK, ANSWERED, 0.7, True)
    assert len(passes) == 1
    expected = response_logprobs(models.policy, IDS, MASK, ANSWERED, 0.7, True)
    torch.testing.assert_close((logprobs, entropies), expected)
    torch.testing.assert_close(values, values_alone(models.policy, models.value, IDS, MASK, ANSWERED))
    hidden = models.policy.base_model(input_ids=IDS[1:]).last_hidden_state[0]
    assert values[1, 1].item() == pytest.approx((hidden[3] @ models.value.score.weight[0]).item(), abs=1e-6)
    assert values[1, 2].item() == 0


def test_frozen_weights_can_be_held_in_half_the_bytes(folder, reward_folder):
    models = load(folder, reward_folder, frozen_dtype="bfloat16")
    assert {p.dtype for p in models.reference.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in models.policy.parameters()} == {torch.float32}

    models = load(folder, reward_folder, frozen_dtype="bfloat16", finetune=LORA)
    assert {p.dtype for p in models.policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in models.policy.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(logprobs_of(models.policy), logprobs_of(models.reference), atol=0, rtol=0)


def test_four_bits_hold_the_frozen_backbones(folder, reward_folder):
    adapter = FineTune(mode="lora", rank=4, export="adapter")
    models = load(folder, reward_folder, frozen_dtype="nf4", finetune=adapter)
    assert not any(learns_nothing_of_padding(model) for model in (models.policy, models.value, models.scorer))
    for model in (models.policy, models.reference, models.value.model, models.scorer.model.model):
        kinds = {p.dtype for name, p in model.named_parameters() if "_proj" in name and "lora" not in name}
        assert kinds == {torch.uint8}
    torch.testing.assert_close(logprobs_of(models.policy), logprobs_of(models.reference))
    torch.testing.assert_close(values_of(models.value), values_of(models.scorer.model))
    plain = load_causal_lm(folder)
    assert (logprobs_of(models.policy) - logprobs_of(plain)).abs().max() < 0.5
    assert storages(*models) < 0.8 * (storages(plain) + storages(load_reward_model(reward_folder)))
    logprobs_of(models.policy).sum().backward()
    assert all(p.grad is not None for p in models.policy.parameters() if p.requires_grad)

    for settings, what in [({}, "needs finetune.mode lora"), ({"finetune": LORA}, "needs finetune.export adapter")]:
        with pytest.raises(UserError, match=what):
            load(folder, reward_folder, frozen_dtype="nf4", **settings)


def test_what_does_not_go_together_is_refused(folder, reward_folder):
    with pytest.raises(UserError, match="value_name_or_path must be null"):
        ModelSource(folder, reward_folder, value=reward_folder, value_trunk="policy")
    with pytest.raises(UserError, match="dropout must be 0"):
        ModelSource(folder, reward_folder, finetune=FineTune(mode="lora", dropout=0.1))


def test_a_twin_shares_what_is_frozen_and_copies_the_rest(folder):
    model = load_causal_lm(folder)
    choose_trained(model, FineTune(mode="last_layer"))
    twin = frozen_twin(model)
    mine, its = dict(model.named_parameters()), dict(twin.named_parameters())
    assert {name for name in mine if mine[name] is its[name]} == {n for n, p in mine.items() if not p.requires_grad}
    assert same_weights(weights(model), weights(twin))
    assert not twin.training


def test_a_scalar_model_beside_a_language_model_is_that_of_the_folder(folder, tmp_path):
    for name in (folder, save_gpt2(tmp_path / "gpt2", dropout=0.5)):
        model = load_causal_lm(name)
        choose_trained(model, LORA)
        beside, plain = scalar_beside(model), new_scalar_lm(name)
        assert not values_of(beside).any()
        with torch.no_grad():
            beside.model.score.weight.copy_(plain.model.score.weight)
        torch.testing.assert_close(beside.raw(IDS, MASK)[MASK], plain.raw(IDS, MASK)[MASK])
        shared = {p.data_ptr() for p in model.base_model.parameters()}
        assert {p.data_ptr() for p in beside.model.base_model.parameters()} == shared
        assert copy.deepcopy(beside.calibration) == beside.calibration


@pytest.mark.parametrize("mode", ["all", "last_layer", "lora"])
def test_a_reference_of_its_own_shares_nothing_with_the_policy(folder, reward_folder, tmp_path, mode):
    other = load_causal_lm(folder)
    disturb(other)
    other.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    finetune = FineTune(mode="lora", rank=4) if mode == "lora" else FineTune(mode=mode)
    models = load(folder, reward_folder, reference=str(tmp_path), finetune=finetune)
    shared = {p.data_ptr() for p in models.reference.parameters()} & {p.data_ptr() for p in models.policy.parameters()}
    assert not shared
    torch.testing.assert_close(logprobs_of(models.reference), logprobs_of(other), atol=1e-6, rtol=0)
    disturb(models.policy)
    torch.testing.assert_close(logprobs_of(models.reference), logprobs_of(other), atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in models.reference.parameters())

    half = load(folder, share_of_letters, reference=str(tmp_path), finetune=finetune, frozen_dtype="bfloat16")
    frozen = {p.dtype for p in half.policy.parameters() if not p.requires_grad}
    assert frozen == (set() if mode == "all" else {torch.bfloat16})  # as with a reference that shares them
    assert {p.dtype for p in half.reference.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.policy.parameters() if p.requires_grad} == {torch.float32}


def test_a_reference_that_is_the_start_by_another_name_is_a_twin(folder):
    models = load(folder, share_of_letters, reference=f"{folder}/.", finetune=LORA)
    assert models.reference.get_input_embeddings().weight is models.policy.get_input_embeddings().weight


def test_a_reference_must_be_there_and_read_the_same_tokens(folder, tmp_path):
    with pytest.raises(UserError, match=r"model folder '\./nowhere' does not exist"):
        ModelSource(folder, share_of_letters, reference="./nowhere").check()
    save_llama(tmp_path, tokenizer=tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["<a>", "<b>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^reference '.*' reads other tokens than '.*'; name one that shares them$"):
        load(folder, share_of_letters, reference=str(tmp_path))
