"""The stages inside Lightning: its callbacks, options, checkpoints and copies, and what does not go with them."""

import copy
import json
import logging
import pickle
import sys
import warnings
from datetime import timedelta
from functools import partial
from types import ModuleType

import pytest
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from helpers.stages import (
    MemoryLogger,
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    same_weights,
    save_llama,
    save_reward_model,
    share_of_letters,
    trainer,
    weights,
)
from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import (
    DPOModule,
    FineTune,
    GRPOModule,
    InstructionDataModule,
    KLPenalty,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    RLOOModule,
    Sampling,
    SFTModule,
    UserError,
)
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.models.tokenizer import check_same_words

ADAMW = partial(torch.optim.AdamW, lr=1e-3, betas=(0.8, 0.9))
LORA = FineTune(mode="lora", rank=2, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "llama")
    return {"base": base, "reward": save_reward_model(root / "reward", base)}


def sft(folders, **settings):
    return SFTModule(folders["base"], **settings)


def reward(folders, **settings):
    return RewardModule(folders["base"], **settings)


def ppo(folders, **settings):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 2, "sampling": Sampling(max_new_tokens=3)}
    return PPOModule(folders["base"], **({"reward": folders["reward"]} | sizes | settings))


def dpo(folders, **settings):
    return DPOModule(folders["base"], **settings)


def groups(kind, folders, **settings):
    sizes = {"rollout_batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 4, "ppo_epochs": 2}
    options = {"sampling": Sampling(max_new_tokens=3)} | sizes | settings
    return kind(folders["base"], **({"reward": folders["reward"]} | options))


STAGES = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": ppo,
    "rloo": partial(groups, RLOOModule),
    "grpo": partial(groups, GRPOModule),
}
ONLINE = {"ppo", "rloo", "grpo"}


def data(stage, folders):
    base, split = folders["base"], {"validation_split": 0.0}
    if stage in ONLINE:
        return PromptDataModule(base, prompt_rows(8), rollout_batch_size=4, max_prompt_length=40, **split)
    if stage in ("reward", "dpo"):
        return PreferenceDataModule(base, preference_rows(8), batch_size=4, max_length=48, **split)
    return InstructionDataModule(base, instruction_rows(8), batch_size=4, max_length=48, **split)


@pytest.mark.parametrize("stage", list(STAGES))
def test_callbacks_get_the_loss_and_checkpoints_are_saved_by_time_and_by_step_without_advice(folders, tmp_path, stage):
    seen = []
    by_time = ModelCheckpoint(tmp_path, "t{step}", train_time_interval=timedelta(0), save_top_k=-1)
    by_step = ModelCheckpoint(tmp_path, "s{step}", every_n_train_steps=1, save_top_k=-1)
    losses = LambdaCallback(on_train_batch_end=lambda trainer, module, outputs, *_: seen.append(outputs["loss"]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        log = fit(
            STAGES[stage](folders),
            data(stage, folders),
            enable_checkpointing=True,
            callbacks=[losses, LearningRateMonitor(), by_time, by_step],
        )

    assert [(loss.shape, loss.requires_grad) for loss in seen] == [((), False)] * 2
    if stage not in ONLINE:
        name = "train/objective" if "objective" in log.names("train") else "train/loss"
        assert torch.equal(torch.stack(seen), torch.tensor(log.series(name)))
    steps = [4, 8] if stage in ONLINE else [1, 2]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
        f"{how}step={n}.ckpt" for how in "st" for n in steps
    ]
    assert not [warning for warning in said if "manual optimization" in str(warning.message)]


def test_a_monitored_checkpoint_by_step_waits_for_its_metric(folders, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", monitor="train/loss", every_n_train_steps=1, save_top_k=1)
    log = fit(sft(folders), data("sft", folders), enable_checkpointing=True, callbacks=[saver], max_epochs=2)

    best = min(range(4), key=log.series("train/loss").__getitem__)
    assert saver.best_model_path.endswith(f"step={best + 1}.ckpt")


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_run_may_begin_with_a_validation_of_its_own(folders, stage):
    """Lightning validates in inference mode, whose tensors no later run may write."""
    if stage == "reward":  # nobody could validate a head that is fresh
        folders = {**folders, "base": folders["reward"]}
    module, batches = STAGES[stage](folders), data(stage, folders)
    batches.validation_data = batches.data
    trainer().validate(module, batches, verbose=False)
    log = fit(module, data(stage, folders), max_steps=1)
    assert log.calls


@pytest.mark.parametrize("stage", list(STAGES))
def test_modules_can_be_copied_and_pickled(folders, stage):
    module = STAGES[stage](folders)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] < 1e-4
        fit(copied, data(stage, folders), max_steps=1)
    module.configure_model()
    assert same_weights(weights(pickle.loads(pickle.dumps(module))), weights(module))


CHANGED = {
    "sft": {"label_smoothing": 0.1, "sampling": Sampling(max_new_tokens=3, stop_strings=["\n"])},
    "reward": {"loss": "average", "prefix_sharing": False},
    "dpo": {"loss": "robust", "label_smoothing": 0.1, "sft_coef": 0.2},
    "ppo": {"reward": share_of_letters, "kl": KLPenalty(0.1, target=3.0), "value_lr": 3e-3},
    "rloo": {"reward": share_of_letters, "clip_range_high": 0.28, "engine": TransformersEngine},
    "grpo": {"loss": "grpo", "scaled": False, "kl": KLPenalty(0.1, estimator="k2")},
}


@pytest.mark.parametrize("stage", list(STAGES))
def test_load_from_checkpoint_gives_back_every_setting(folders, tmp_path, stage):
    settings = {"optimizer": ADAMW, "finetune": LORA, "warmup_steps": 2, "lr_schedule": "constant", **CHANGED[stage]}
    module = STAGES[stage](folders, **settings)
    logger = MemoryLogger()
    run = trainer(max_steps=1, logger=logger)
    run.fit(module, data(stage, folders))
    run.save_checkpoint(tmp_path / "end.ckpt")

    loaded = type(module).load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)

    for name, value in settings.items():
        if name == "optimizer":
            assert loaded.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["betas"] == (0.8, 0.9)
        else:
            given = getattr(loaded, name)
            assert given in (value, f"{value.__module__}.{value.__qualname__}" if callable(value) else value), name
    assert same_weights(weights(loaded), weights(module))
    changed = type(module).load_from_checkpoint(tmp_path / "end.ckpt", optimizer=torch.optim.SGD, warmup_steps=7)
    assert (changed.optimizer, changed.warmup_steps, changed.finetune) == (torch.optim.SGD, 7, LORA)


def test_a_lambda_cannot_come_back_from_a_checkpoint_and_is_asked_for(folders, tmp_path):
    run = trainer(max_steps=1)
    run.fit(sft(folders, optimizer=lambda params: torch.optim.SGD(params, lr=0.1)), data("sft", folders))
    run.save_checkpoint(tmp_path / "end.ckpt")

    with pytest.raises(
        UserError, match=r"nothing can be imported as '.*<lambda>'; pass optimizer, also to load_from_"
    ) as e:
        SFTModule.load_from_checkpoint(tmp_path / "end.ckpt")
    assert "\n" not in str(e.value)
    assert SFTModule.load_from_checkpoint(tmp_path / "end.ckpt", optimizer=torch.optim.SGD).optimizer is torch.optim.SGD


@pytest.mark.parametrize("given", [lambda prompts, responses: [0.0] * len(prompts), partial(share_of_letters)])
def test_a_reward_that_cannot_be_imported_is_asked_for(folders, given):
    saved = ppo(folders, reward=given).hparams["reward"]
    with pytest.raises(UserError, match=r"^reward was '.*<.*>', which cannot be imported: pass reward to load_from_ch"):
        ppo(folders, reward=saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 2}, r"Trainer\(accumulate_grad_batches=2\): .*micro_batch_size"),
        ({"gradient_clip_val": 0.5}, r"Trainer\(gradient_clip_val=0.5\): .*the module's gradient_clip_val"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler .*micro_batch_size"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder does not go with .*compare short runs"),
        ({"callbacks": [BatchSizeFinder()]}, "BatchSizeFinder does not go with .*max_tokens_per_batch"),
        ({"callbacks": [StochasticWeightAveraging(1e-3)]}, r"StochasticWeightAveraging .*use rlhf_lightning\.EMA"),
    ],
)
def test_what_manual_optimisation_cannot_do_is_refused_with_what_to_do_instead(folders, settings, message):
    with pytest.raises(UserError, match=message) as error:
        fit(sft(folders), data("sft", folders), **settings)
    assert "\n" not in str(error.value)


def test_weights_are_averaged_as_the_refusal_says(folders):
    module = sft(folders)
    plain = fit(sft(folders), data("sft", folders)).series("train/loss")
    averaged = fit(module, data("sft", folders), callbacks=[EMAWeightAveraging(decay=0.5)]).series("train/loss")
    assert averaged == plain


@pytest.mark.parametrize(
    ("stage", "other", "message"),
    [
        ("sft", "reward", "SFTModule takes batches like .*InstructionBatch, which InstructionDataModule makes"),
        ("sft", "ppo", "this PromptBatch has no attribute input_ids"),
        ("reward", "sft", "RewardModule takes .*PreferenceDataModule makes; this InstructionBatch has no .*chosen_ids"),
        ("ppo", "sft", "PPOModule takes .*PromptDataModule makes; this InstructionBatch has no attribute prompt_ids"),
    ],
)
def test_the_data_of_another_stage_are_refused(folders, stage, other, message):
    with pytest.raises(UserError, match=message) as error:
        fit(STAGES[stage](folders), data(other, folders))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", list(STAGES))
def test_data_of_another_tokenizer_are_refused(folders, tmp_path, stage):
    tokenizer = tiny_tokenizer()
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), eos_token="<|end|>")
    other.save_pretrained(tmp_path)
    message = rf"^the data are tokenised by '{tmp_path}', in which id {vocab['b']} is 'b'; to the model of .* it is 'a'"
    with pytest.raises(UserError, match=message):
        fit(STAGES[stage](folders), data(stage, {"base": str(tmp_path)}))


def test_tokens_that_were_added_to_the_data_s_tokenizer_are_no_other_words(tmp_path):
    more = tiny_tokenizer()
    more.add_tokens(["<tool>"])
    check_same_words(tiny_tokenizer(pad="eos"), more)
    check_same_words(more, tiny_tokenizer(pad="none"))


def test_a_batch_that_is_a_dict_is_refused(folders):
    loader = DataLoader([{"input_ids": torch.ones(3).long(), "labels": torch.ones(3).long()}], batch_size=1)
    with pytest.raises(UserError, match=r"takes batches like .*InstructionBatch.*this dict has no attribute input_ids"):
        fit(sft(folders), loader)


@pytest.mark.parametrize(("max_steps", "said"), [(10, 1), (2, 0), (1, 0), (-1, 0)])
def test_a_run_that_ends_before_its_steps_are_made_says_why(folders, caplog, max_steps, said):
    with caplog.at_level(logging.INFO, "pytorch_lightning"):
        fit(sft(folders), data("sft", folders), max_steps=max_steps)
    lines = [line for line in caplog.messages if "ended the run" in line]
    assert lines == ["max_epochs 1, which can be raised, ended the run after 2 of max_steps 10"] * said


def test_beside_the_package_lightning_a_line_says_what_to_import(folders, monkeypatch, recwarn):
    sft(folders)
    assert not [warning for warning in recwarn if "import lightning as L" in str(warning.message)]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", ModuleType("lightning.pytorch"))
    with pytest.warns(UserWarning, match="write import pytorch_lightning as L in place of import lightning as L"):
        sft(folders)
