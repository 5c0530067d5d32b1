"""Every stage in every precision: what is float32 all the same, what the weights are, and that small steps arrive."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torchmetrics import Metric
from transformers import AutoConfig

from helpers.stages import (
    adamw,
    disturb_random_numbers,
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    save_llama,
    save_reward_model,
    trainer,
    weights,
)
from rlhf_lightning import (
    FineTune,
    HFExport,
    InstructionDataModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
    UserError,
)
from rlhf_lightning.algorithms import stage as stage_module
from rlhf_lightning.cli.main import main
from rlhf_lightning.forward.casts import CastWeights
from rlhf_lightning.training.master_weights import MasterWeights

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
"""Each precision and the type of its weights."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base")
    return {"base": base, "reward": save_reward_model(root / "reward", base)}


def sft(folders, lr=1e-3, rows=8, **options):
    module = SFTModule(
        folders["base"], optimizer=adamw(lr), lr_schedule="constant", warmup_steps=0, micro_batch_size=2, **options
    )
    examples = instruction_rows(rows)
    settings = {"validation_data": examples[:3], "max_length": 48, "batch_size": 4}
    return module, InstructionDataModule(folders["base"], examples, **settings)


def reward(folders, lr=1e-3, rows=8, **options):
    module = RewardModule(
        folders["base"],
        loss="average",
        optimizer=adamw(lr),
        lr_schedule="constant",
        warmup_steps=0,
        micro_batch_size=2,
        **options,
    )
    pairs = [{**row, "weight": 1 / 3, "margin": 0.1} for row in preference_rows(rows)]
    settings = {"validation_data": pairs[:3], "max_length": 48, "batch_size": 4}
    return module, PreferenceDataModule(folders["base"], pairs, **settings)


def ppo(folders, lr=1e-3, rows=8, **options):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 2, "micro_batch_size": 1, "ppo_epochs": 2} | options
    sampling = Sampling(max_new_tokens=6)
    module = PPOModule(
        folders["base"],
        folders["reward"],
        sampling=sampling,
        optimizer=adamw(lr),
        lr_schedule="constant",
        **sizes,
    )
    prompts = prompt_rows(rows)
    settings = {"validation_data": prompts[:3], "rollout_batch_size": 4, "max_prompt_length": 40}
    return module, PromptDataModule(folders["base"], prompts, **settings)


STAGES = {"sft": sft, "reward": reward, "ppo": ppo}


class Watch:
    """Notes the type of every loss and of every number that a stage logs or hands on."""

    def __init__(self, module):
        self.seen = {}
        backward, log = module.manual_backward, module.log
        module.manual_backward = lambda loss, **options: (self.note(loss=loss), backward(loss, **options))[1]
        module.log = lambda name, value, **options: (self.note(**{name: value}), log(name, value, **options))[1]
        for name in ("loss_sums", "pair_scores", "pair_metrics", "rollout", "answer", "measure_answers"):
            if hasattr(module, name):
                setattr(module, name, self.watched(name, getattr(module, name)))

    def watched(self, name, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            self.note_all(name, result)
            return result

        return call

    def note_all(self, name, value):
        if hasattr(value, "_asdict"):
            value = value._asdict()
        if isinstance(value, dict):
            for key, item in value.items():
                self.note_all(f"{name}.{key}", item)
        elif isinstance(value, tuple | list):
            for number, item in enumerate(value):
                self.note_all(f"{name}.{number}", item)
        else:
            self.note(**{name: value})

    def note(self, **values):
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.seen.setdefault(name, set()).add(value.dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_float32_and_what_weights_and_optimizer_state_are(stage, precision, folders):
    disturb_random_numbers(0)
    module, data = STAGES[stage](folders)
    watch = Watch(module)
    fit(module, data, precision=precision, max_epochs=1)

    assert {name: types for name, types in watch.seen.items() if types != {torch.float32}} == {}
    expected = {
        "sft": {"loss", "loss_sums.0", "loss_sums.1", "train/loss", "train/perplexity", "val/perplexity"},
        "reward": {"loss", "pair_scores.0", "pair_metrics.0", "train/margin", "train/loss"},
        "ppo": {
            "loss",
            "measure_answers.values",
            "measure_answers.scores",
            "rollout.0.advantages",
            "rollout.0.ref_logprobs",
        }
        | {"rollout.0.logprobs", "rollout.0.returns", "rollout.1.kl", "train/score", "train/kl"},
    }
    assert expected[stage] <= watch.seen.keys()
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    assert metrics
    assert {metric.dtype for metric in metrics} == {torch.float32}
    check_weights_and_optimizer_state(module, precision)


def check_weights_and_optimizer_state(module, precision):
    """Weights are what the precision says, and moments float32 whatever it says."""
    assert {p.dtype for p in module.parameters()} == {PRECISIONS[precision]}
    optimizer = module.trainer.optimizers[0]
    assert isinstance(optimizer, MasterWeights) == (precision == "bf16-true")
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * sum(p.requires_grad for p in module.parameters())
    assert {moment.dtype for moment in moments} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_the_rollout_knows_already_is_float32_too(precision, folders):
    """One update on the whole rollout takes the log-probabilities of generation; the values are a head's."""
    disturb_random_numbers(0)
    module, data = ppo(folders, minibatch_size=4, ppo_epochs=1, value_trunk="policy")
    watch = Watch(module)
    fit(module, data, precision=precision, max_epochs=1)
    assert watch.seen.pop("answer.0.hidden") == {PRECISIONS[precision]}  # activations, which the head reads
    assert {name: types for name, types in watch.seen.items() if types != {torch.float32}} == {}
    assert {"answer.0.logprobs", "rollout.0.logprobs", "rollout.0.values", "loss"} <= watch.seen.keys()


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_in_double_precision_trains_as_in_single(stage, folders):
    logs = []
    for precision in ("64-true", "32-true"):
        disturb_random_numbers(0)
        module, data = STAGES[stage](folders)
        logs.append(fit(module, data, precision=precision, max_steps=8, max_epochs=-1, limit_val_batches=0))
    names = {"sft": ["loss", "grad_norm"], "reward": ["loss", "grad_norm"], "ppo": ["score", "kl", "grad_norm_policy"]}
    for name in names[stage]:
        double, single = (log.series(f"train/{name}") for log in logs)
        assert double == pytest.approx(single, rel=1e-3, abs=1e-5)
        assert double != single


def changed(before, after):
    """Share of the numbers of two state dicts that differ."""
    differ = sum(int((before[name] != after[name]).sum()) for name in before)
    return differ / sum(tensor.numel() for tensor in before.values())


SMALL, STEPS = 5e-5, 12  # far below the spacing of bfloat16 at most weights, which are about 0.1; all steps are above


def trained_weights(stage, folders, precision="bf16-true"):
    disturb_random_numbers(0)
    module, data = STAGES[stage](folders, SMALL)
    module.configure_model()
    before = weights(module.export_model.to(torch.bfloat16))
    fit(module, data, precision=precision, max_steps=STEPS, max_epochs=-1, limit_val_batches=0)
    return before, weights(module.export_model)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_training_moves_weights_that_plain_bfloat16_leaves(stage, folders, monkeypatch):
    moved = changed(*trained_weights(stage, folders))
    monkeypatch.setattr(stage_module, "with_master_weights", lambda optimizer, trainer: optimizer)
    stalled = changed(*trained_weights(stage, folders))
    assert stalled < 0.3
    assert moved > stalled + 0.3


@pytest.mark.long
def test_the_sum_of_small_steps_is_that_of_a_float32_run(folders, monkeypatch):
    def arrived(before, after, reference):
        """How far along the float32 run's way the weights got; 1 is all the way."""
        way = [(reference[n] - before[n].float()).flatten() for n in before]
        went = [(after[n].float() - before[n].float()).flatten() for n in before]
        return float(torch.cat(way) @ torch.cat(went) / torch.cat(way).square().sum())

    start, reference = trained_weights("sft", folders, "32-true")
    assert arrived(start, trained_weights("sft", folders)[1], reference) == pytest.approx(1, abs=0.1)
    monkeypatch.setattr(stage_module, "with_master_weights", lambda optimizer, trainer: optimizer)
    assert arrived(start, trained_weights("sft", folders)[1], reference) < 0.4


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_bf16_true_run_ends_bit_for_bit_as_the_uninterrupted_one(stage, folders, tmp_path):
    def run(name, checkpoint=None, **limits):
        disturb_random_numbers(1 if checkpoint is None else 2)
        module, data = STAGES[stage](folders)
        keep = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"precision": "bf16-true", "callbacks": [keep], "enable_checkpointing": True}
        fit(module, data, ckpt_path=checkpoint, limit_val_batches=0, **options, **limits)
        module.trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return torch.load(tmp_path / f"{name}.ckpt", weights_only=True)

    whole = run("whole", max_epochs=2)
    first = min((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    resumed = run("resumed", first, max_epochs=2)
    assert resumed["global_step"] == whole["global_step"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    states = [checkpoint["optimizer_states"][0] for checkpoint in (whole, resumed)]
    for a, b in zip(*(state["master_weights"] for state in states), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    trained = {n: t for n, t in whole["state_dict"].items() if t.dtype == torch.bfloat16}
    assert sum(t.numel() for t in states[0]["master_weights"]) <= sum(t.numel() for t in trained.values())


@pytest.mark.parametrize(("dtype", "saved"), [("auto", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("stage", STAGES)
def test_the_export_of_a_bf16_true_run(stage, dtype, saved, folders, tmp_path):
    disturb_random_numbers(0)
    module, data = STAGES[stage](folders)
    export = HFExport(str(tmp_path / "export"), dtype=dtype)
    fit(module, data, precision="bf16-true", max_steps=1, limit_val_batches=0, callbacks=[export])
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, saved)}
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert config.dtype == (getattr(torch, saved) if dtype == "auto" else config.dtype)
    for name, tensor in tensors.items():
        assert torch.equal(tensor.to(torch.bfloat16), weights(module.export_model)[name])


@pytest.mark.parametrize(
    ("precision", "frozen_dtype", "held"),
    [
        ("32-true", "auto", torch.float32),
        ("32-true", "bfloat16", torch.bfloat16),
        ("bf16-mixed", "auto", torch.float32),
        ("bf16-mixed", "bfloat16", torch.bfloat16),
        ("bf16-true", "auto", torch.bfloat16),
        ("bf16-true", "bfloat16", torch.bfloat16),
    ],
)
def test_what_frozen_models_are_held_in(precision, frozen_dtype, held, folders):
    disturb_random_numbers(0)
    module, data = ppo(folders, frozen_dtype=frozen_dtype)
    log = fit(module, data, precision=precision, max_steps=4, limit_val_batches=0)
    for model in (module.reference_model, module.scorer):
        assert {p.dtype for p in model.parameters()} == {held}
    tables = [table for name, table in module.named_buffers() if name.endswith("inv_freq")]
    assert len(tables) == 8  # four models
    assert {table.dtype for table in tables} == {torch.float32}
    assert {p.dtype for p in module.policy.parameters()} == {PRECISIONS[precision]}
    assert abs(log.series("train/kl")[0]) < 0.2


@pytest.mark.parametrize("frozen_dtype", ["float32", "float16"])
def test_frozen_models_that_bf16_true_would_cast_anyway_are_refused(frozen_dtype, folders):
    module, data = ppo(folders, frozen_dtype=frozen_dtype)
    with pytest.raises(UserError, match=f"frozen_dtype {frozen_dtype}.*bf16-true") as error:
        fit(module, data, precision="bf16-true")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_are_cast_once_train_to_the_same_bits(stage, folders, monkeypatch):
    def trained():
        disturb_random_numbers(0)
        module, data = STAGES[stage](folders)
        fit(module, data, precision="bf16-mixed", max_steps=4, max_epochs=-1, limit_val_batches=0)
        return module.state_dict()

    found = trained()
    monkeypatch.setattr(CastWeights, "used", lambda self: nullcontext())
    for name, weight in trained().items():
        assert torch.equal(found[name], weight), name


def test_a_reward_head_starts_alike_in_every_precision(folders):
    heads = []
    for precision in PRECISIONS:
        disturb_random_numbers(5)
        module, data = reward(folders)
        trainer(precision=precision, max_steps=1, limit_train_batches=0, limit_val_batches=0).fit(module, data)
        heads.append(module.export_model.score.weight.detach().to(torch.bfloat16))
    assert all(torch.equal(heads[0], head) for head in heads)


@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
def test_float16_is_refused(precision, folders, monkeypatch):
    module, data = sft(folders)
    run = trainer(logger=False)
    monkeypatch.setattr(type(run), "precision", precision)  # the Trainer itself wants a GPU for some of them
    with pytest.raises(UserError, match="bf16-mixed"):
        run.fit(module, data)
    assert not (Path(run.default_root_dir) / "export").exists()


def test_lora_under_bf16_true_copies_the_adapters_only(folders):
    disturb_random_numbers(0)
    module, data = sft(folders, finetune=FineTune("lora", rank=2))
    fit(module, data, precision="bf16-true", max_steps=2, limit_val_batches=0)
    trained = [p for p in module.parameters() if p.requires_grad]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    assert {p.dtype for p in trained + frozen} == {torch.bfloat16}
    assert trained
    assert frozen
    masters = module.trainer.optimizers[0].state_dict()["master_weights"]
    assert [master.shape for master in masters] == [
        p.shape for group in module.trainer.optimizers[0].param_groups for p in group["params"]
    ]
    assert sum(map(torch.numel, masters)) == sum(p.numel() for p in trained)


def test_lora_in_ppo_with_the_shared_base_in_bfloat16_and_adapters_in_float32(folders):
    disturb_random_numbers(0)
    module, data = ppo(folders, finetune=FineTune("lora", rank=2), frozen_dtype="bfloat16")
    fit(module, data, precision="bf16-mixed", max_steps=4, limit_val_batches=0)
    held = {
        wanted: {p.dtype for p in module.policy.parameters() if p.requires_grad == wanted} for wanted in (True, False)
    }
    assert held == {True: {torch.float32}, False: {torch.bfloat16}}
    assert module.policy.get_input_embeddings().weight is module.reference_model.get_input_embeddings().weight


PAGE = (Path(__file__).parents[2] / "docs" / "precision.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"^```yaml (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", SNIPPETS)
def test_the_settings_of_the_page_are_taken_by_the_command_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rlhf"])
    (tmp_path / name).write_text(SNIPPETS[name], encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(tmp_path / name), "--print_config"])
    assert end.value.code == 0
    parsed, given = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(SNIPPETS[name])
    assert parsed["trainer"]["precision"] == given["trainer"]["precision"]
    for key, value in given["model"]["init_args"].items():
        now = parsed["model"]["init_args"][key]
        assert now == (now | value if isinstance(value, dict) else value)


def test_the_page_has_settings_to_copy():
    assert set(SNIPPETS) == {"frozen.yaml", "lora.yaml"}
