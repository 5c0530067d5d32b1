"""What a plan says of strategies, batches and models, by numbers worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.planned import STAGES, arguments, planned, save_models
from rlhf_lightning.errors import UserError
from rlhf_lightning.planning import Request, plan
from rlhf_lightning.planning.advice import advise
from rlhf_lightning.planning.plan import GIB
from rlhf_lightning.planning.skeletons import Skeletons

OURS = "rlhf_lightning"
DEEP = 5  # blocks, the fewest of which a plan runs fewer
SMALL = {"hidden_size": 64, "num_key_value_heads": 2, "intermediate_size": 160, "vocab_size": 512}
ONLINE = {"reward": "runs/no/reward", "rollout_batch_size": 8}
DATA = {"max_length": 32, "batch_size": 8, "max_prompt_length": 16}


def zero(stage, **options):
    return {"class_path": f"{OURS}.DeepSpeedStrategy", "init_args": {"stage": stage, **options}}


FSDP2 = {"class_path": f"{OURS}.FSDP2Strategy", "init_args": {}}


def write_config(folder, **shape):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, **shape}))
    return str(folder)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A folder with nothing but a config, of one block: a plan costs by the block."""
    return write_config(tmp_path_factory.mktemp("lm"), num_hidden_layers=1, **SMALL)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The same of several blocks."""
    return write_config(tmp_path_factory.mktemp("deep"), num_hidden_layers=DEEP, **SMALL)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """One that is large against what is outside of PyTorch."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 8, "intermediate_size": 11008, "vocab_size": 32000}
    return write_config(tmp_path_factory.mktemp("large"), **shape)


def request(lm, kind="sft", gpus=1, strategy="auto", precision="32-true", data=DATA, gpu_memory=None, **given):
    made = {"model_name_or_path": lm, **given}
    trainer = {"strategy": strategy, "precision": precision}
    return Request(STAGES[kind], made, data, trainer, gpus=gpus, gpu_memory=gpu_memory)


def lying(plan):
    """Bytes of the first role: weights, gradients, optimizer state and float32 copies."""
    role = plan.roles[0]
    return role.weights + role.gradients + role.optimizer + role.copies


# Embeddings and output layer, then a block: attention, feed-forward and two norms; the last norm.
AROUND, BLOCK = 2 * 512 * 64 + 64, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
PARAMETERS = AROUND + BLOCK


@pytest.mark.parametrize(
    ("strategy", "precision", "bytes_each"),
    [
        ("ddp", "32-true", 16),
        ("ddp", "bf16-mixed", 16),
        ("ddp", "bf16-true", 16),
        (zero(0), "bf16-mixed", 16),
        (zero(1, gradient_dtype="bfloat16"), "bf16-mixed", 4 + 12 / 4),
        (zero(2, gradient_dtype="bfloat16"), "bf16-mixed", 2 + 14 / 4),
        (zero(3, gradient_dtype="bfloat16"), "bf16-true", 16 / 4),
        (zero(2, gradient_dtype="float32"), "bf16-mixed", 2 + 16 / 4),
        (FSDP2, "bf16-mixed", 16 / 4),
        (FSDP2, "bf16-true", 16 / 4),
    ],
)
def test_bytes_of_each_weight_are_those_of_the_table_of_strategies(lm, strategy, precision, bytes_each):
    made = plan(request(lm, gpus=4, strategy=strategy, precision=precision))
    assert made.roles[0].parameters == made.roles[0].trained == PARAMETERS
    assert lying(made) == PARAMETERS * bytes_each


@pytest.mark.parametrize(
    ("strategy", "gradients", "weights"),
    [
        ("ddp", 2 * 4, 0),
        (zero(1, gradient_dtype="bfloat16"), 2, 2),
        (zero(2, gradient_dtype="bfloat16"), 2 * 2, 2),
        (zero(3, gradient_dtype="bfloat16"), 2 * 2, 2 * 2 * 2),
        (FSDP2, 2 * 4, 2 * 2 * 2),
    ],
)
def test_what_is_sent_for_a_step_of_two_micro_batches(lm, strategy, gradients, weights):
    made = plan(request(lm, gpus=4, strategy=strategy, precision="bf16-mixed", micro_batch_size=1))
    assert made.sizes["micro_batches"] == 2
    around = PARAMETERS * 3 / 4  # what a ring of 4 passes on
    assert made.sent == {"gradients": gradients * around} | ({"weights": weights * around} if weights else {})


def test_with_lora_adapters_alone_are_reduced(lm):
    made = plan(request(lm, gpus=2, strategy="ddp", finetune={"mode": "lora", "rank": 4}))
    attention = 4 * ((64 + 64) * 2 + (64 + 32) * 2)
    adapters = attention + 4 * 3 * (64 + 160)
    assert made.roles[0].trained == adapters
    assert made.sent == {"gradients": adapters * 2 * 4 // 2}


@pytest.mark.long
def test_a_deep_model_follows_from_two_shallow_ones(deep, monkeypatch):
    requests = [
        request(deep, micro_batch_size=4),
        request(deep, micro_batch_size=4, gradient_checkpointing=True, precision="bf16-mixed"),
        request(
            deep, "ppo", reward="runs/no/reward", rollout_batch_size=8, minibatch_size=8, finetune={"mode": "lora"}
        ),
    ]
    shallow = [plan(each).parts for each in requests]
    monkeypatch.setattr(Skeletons, "depths", {DEEP, DEEP + 1})  # not known to be one depth: run as they are
    for parts, each in zip(shallow, requests, strict=True):
        for part, whole in zip(parts, plan(each).parts, strict=True):
            assert part.name == whole.name
            assert part.together == pytest.approx(whole.together, rel=1e-3)


def test_batch_sizes_are_those_of_all_processes(lm):
    made = plan(request(lm, gpus=4, strategy="ddp"))
    assert made.sizes == {"step": 2, "micro_batch": 2, "micro_batches": 1}
    online = request(lm, "grpo", 2, "ddp", reward="runs/no/reward", rollout_batch_size=8, samples_per_prompt=4)
    made = plan(online.changed("model", minibatch_size=16, micro_batch_size=4, generation_batch_size=8))
    assert made.sizes == {"step": 8, "micro_batch": 4, "micro_batches": 2, "responses": 16, "answered": 8}
    with pytest.raises(UserError, match=r"batch_size \(8\) must be a multiple of the number of processes \(3\)"):
        plan(request(lm, gpus=3, strategy="ddp"))


def test_tokens_are_counted_as_micro_batches_count_them(lm):
    assert plan(request(lm, max_tokens_per_batch=100)).sizes["micro_batch"] == 3
    pairs = request(lm, "reward", max_tokens_per_batch=100)
    assert plan(pairs).sizes["micro_batch"] == 1


def test_offloaded_state_lies_in_main_memory(lm):
    here = plan(request(lm, gpus=4, strategy=zero(2), precision="bf16-mixed"))
    there = plan(request(lm, gpus=4, strategy=zero(2, offload_optimizer=True), precision="bf16-mixed"))
    assert here.held - there.held == PARAMETERS * 12 / 4
    assert here.on_cpu == 0
    assert there.on_cpu == PARAMETERS * (12 + 4)  # with the gradients that the optimizer reads
    all_of_it = {**FSDP2, "init_args": {"cpu_offload": True}}
    made = plan(request(lm, gpus=4, strategy=all_of_it, precision="bf16-mixed"))
    assert (made.held, made.on_cpu) == (0, PARAMETERS * 16)


def test_models_of_ppo_share_what_training_shares(lm):
    online = {"reward": "runs/no/reward", "rollout_batch_size": 8, "minibatch_size": 8}
    roles = {role.name: role for role in plan(request(lm, "ppo", finetune={"mode": "lora"}, **online)).roles}
    assert list(roles) == ["policy", "value", "reference", "reward"]
    assert roles["reference"].shared == roles["reference"].parameters == PARAMETERS
    # The value model's base is the reward model's; of the head each has its own.
    assert roles["reward"].shared == roles["reward"].parameters - 64
    whole = {role.name: role for role in plan(request(lm, "ppo", **online)).roles}
    assert not any(role.shared for role in whole.values())
    trunk = plan(request(lm, "ppo", value_trunk="policy", **online)).roles[1]
    assert (trunk.name, trunk.parameters, trunk.trained) == ("value", 64, 64)


def test_a_reward_function_takes_no_memory(lm, tmp_path, monkeypatch):
    (tmp_path / "my_planned_rewards.py").write_text("def short(prompts, responses): return [0.0 for _ in responses]")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"rollout_batch_size": 8, "minibatch_size": 32, "gpu_memory": 80}
    made = plan(request(lm, "rloo", reward="my_planned_rewards.short", **options))
    assert [role.name for role in made.roles] == ["policy", "reference"]
    assert made.assumed == []


def test_what_a_reward_models_plan_leaves_out_is_said(lm):
    made = request(lm, "reward", data=DATA | {"whole_rankings": True}, gpu_memory=80, calibration_samples=8)
    assert plan(made).assumed == [
        "rankings are taken to have 2 responses; one of K takes K / 2 times the activations",
        "the policy that answers calibration_samples is left out; it is let go before the first step",
    ]


def test_a_reward_model_that_is_still_to_be_trained_has_the_policys_size(lm):
    options = {"rollout_batch_size": 8, "minibatch_size": 32}
    made = plan(request(lm, "rloo", reward="runs/no/export", **options))
    assert made.assumed.pop() == "micro-batches are those of a GPU of 80 GiB; --gpu_memory says another"
    assert made.assumed == ["'runs/no/export' is not there yet: taken for a reward model of the policy's size"]
    assert made.roles[-1].parameters == PARAMETERS - 512 * 64 + 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": "/no/folder"}, "model folder '/no/folder' does not exist"),
        ({"micro_batch_size": 1, "max_tokens_per_batch": 64}, "give one of them"),
    ],
)
def test_what_training_refuses_is_refused(lm, change, message):
    with pytest.raises(UserError, match=message):
        plan(request(lm).changed("model", **change))


def test_unknown_strategies_and_precisions_are_refused(lm):
    with pytest.raises(UserError, match="nothing is known of the memory of strategy xla"):
        plan(request(lm, strategy="xla"))
    with pytest.raises(UserError, match="precision 16-mixed is not supported"):
        plan(request(lm, precision="16-mixed"))


@pytest.mark.long
def test_changes_are_named_the_cheapest_first_until_it_fits(large):
    uncut = {"max_tokens_per_batch": None, "data": {**DATA, "max_length": 4096}}
    # Logits are cut by the memory, here as by what comes out below.
    tight = request(large, gpus=2, strategy="ddp", precision="bf16-mixed", gpu_memory=20, **uncut)
    sharded = plan(
        tight.changed("model", micro_batch_size=1, gradient_checkpointing=True).changed("trainer", strategy=FSDP2)
    )
    tight = Request(**{**vars(tight), "gpu_memory": sharded.peak / GIB / 0.94})
    changes = advise(plan(tight))
    assert [change.options for change in changes] == [
        "--model.micro_batch_size 1",
        "--model.gradient_checkpointing true",
        "--config trainer/fsdp2.yaml",
    ]
    assert [change.fits for change in changes] == [False, False, True]
    peaks = [change.peak for change in changes]
    assert peaks == sorted(peaks, reverse=True)
    assert advise(plan(Request(**{**vars(tight), "gpu_memory": 800}))) == []


def test_what_no_change_mends_ends_the_list(lm):
    nothing = plan(request(lm, gpu_memory=0.5))  # what is outside of PyTorch takes more
    assert not nothing.fits
    assert not any(change.fits for change in advise(nothing))


def test_a_whole_policy_is_held_for_a_rollout_where_there_is_room(deep):
    made = request(
        deep, "rloo", 2, FSDP2, "bf16-mixed", reward="runs/no/reward", rollout_batch_size=8, minibatch_size=32
    )
    unknown, ample = plan(made), plan(Request(**{**vars(made), "gpu_memory": 80}))
    assert ample.parts[0].buffers == (AROUND + DEEP * BLOCK) * 2
    assert unknown.parts[0].buffers < (AROUND + DEEP * BLOCK) * 2
    assert ample.sent_by_rollout["weights, to answer"] * 64 == unknown.sent_by_rollout["weights, to answer"]


def test_a_plan_of_a_tiny_model_with_weights_is_that_of_its_config_alone(tmp_path):
    models = save_models(tmp_path, layers=2)
    with_weights = planned("sft", arguments("sft", *models))
    for file in (tmp_path / "lm").iterdir():
        if file.name != "config.json":
            file.unlink()
    assert planned("sft", arguments("sft", *models)).parts == with_weights.parts


def test_a_reward_model_that_learns_what_was_chosen_has_an_output_layer_and_logits(lm):
    """Of the chosen sides: two pairs of 32 tokens, each of which but the first may be of a response."""
    without, learning = (plan(request(lm, "reward", micro_batch_size=2, lm_coef=coef)) for coef in (0.0, 1.0))
    assert [(role.name, role.trained) for role in learning.roles[1:]] == [("output layer", 512 * 64)]
    assert lying(learning) == lying(without)  # of the reward model itself
    assert without.parts[0].logits == 0
    assert 1 <= learning.parts[0].logits / (2 * 31 * 512 * 4) <= 3


def text(**init_args):
    return {"pretraining": {"class_path": f"{OURS}.InstructionDataModule", "init_args": init_args}}


TEXT = {**ONLINE, "sampling": {"max_new_tokens": 16}, "minibatch_size": 8}


def test_text_that_a_policy_goes_on_learning_is_cut_as_training_cuts_it(lm):
    """On each of two processes 8 rows, 2 at once, so 4 pieces beside 2 micro-batches of responses."""
    asked = request(lm, "ppo", 2, "ddp", **TEXT, micro_batch_size=2, **text(max_length=64, batch_size=16))
    load = asked.load(Skeletons(asked.model).build(asked.stage, asked.model, torch.float32))
    assert (load.rows, load.text_rows, load.text_length, load.texts) == (2, 2, 64, 2)
    none = request(lm, "ppo", 2, "ddp", **TEXT, micro_batch_size=2)
    assert none.load(Skeletons(none.model).build(none.stage, none.model, torch.float32)).texts == 0


def test_text_that_a_policy_goes_on_learning_is_counted(lm):
    """Each of 2 rows of 64 tokens but the first of a row is predicted over 512 words."""
    without, beside = (
        plan(request(lm, "ppo", **TEXT, micro_batch_size=2, **given)) for given in ({}, text(max_length=64))
    )
    names = [{part.name for part in each.parts} for each in (without, beside)]
    assert names[1] - names[0] == {"learns text beside"}
    learns = next(part for part in beside.parts if part.name == "learns text beside")
    assert 1 <= learns.logits / (2 * 63 * 512 * 4) <= 3
    assert beside.peak > without.peak
    assert [role.weights for role in beside.roles] == [role.weights for role in without.roles]


def test_where_losses_go_backward_together_so_does_the_text(lm):
    """None, one and two pieces of text beside each micro-batch."""
    update = []
    for given in ({}, text(max_length=64, batch_size=8), text(max_length=64, batch_size=16)):
        parts = plan(request(lm, "ppo", strategy=zero(2), **TEXT, micro_batch_size=4, **given)).parts
        update.append(next(part.together for part in parts if part.name == "updates"))
    assert update[0] < update[1] < update[2]


def test_text_that_does_not_divide_among_processes_is_refused(lm):
    with pytest.raises(UserError, match=r"pretraining batch_size \(3\) must be a multiple of the number of processes"):
        plan(request(lm, "ppo", 2, "ddp", **TEXT, **text(batch_size=3)))
