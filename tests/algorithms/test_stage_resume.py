"""A run that is cut and resumed ends, bit for bit, where the uninterrupted run ends."""

import itertools
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint

from helpers.stages import (
    adamw,
    disturb_random_numbers,
    fit,
    instruction_rows,
    preference_rows,
    prompt_rows,
    save_gpt2,
    save_llama,
    save_reward_model,
    share_of_letters,
    trainer,
)
from rlhf_lightning import (
    DPOModule,
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

EPOCHS, BATCHES = 2, 3
VALIDATION = 2  # batches before one
WITHIN, AT_THE_END = 2, 3  # batches done when a run is cut: in the middle and at the end of the first epoch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_gpt2(root / "gpt2", dropout=0.2, layers=1)
    return {"base": base, "reward": save_reward_model(root / "reward", base)}


def sft(folders):
    module = SFTModule(folders["base"], optimizer=adamw(1e-3), warmup_steps=2, micro_batch_size=2, dropout=True)
    rows = instruction_rows(12)
    return module, InstructionDataModule(folders["base"], rows, validation_data=rows[:3], max_length=48, batch_size=4)


def reward(folders):
    module = RewardModule(
        folders["base"], loss="average", optimizer=adamw(1e-3), warmup_steps=2, micro_batch_size=2, dropout=True
    )
    rows = preference_rows(12)
    return module, PreferenceDataModule(folders["base"], rows, validation_data=rows[:3], max_length=48, batch_size=4)


def ppo(folders):
    module = PPOModule(
        folders["base"],
        folders["reward"],
        sampling=Sampling(max_new_tokens=6, stop_strings=list("aeiou")),
        rollout_batch_size=4,
        minibatch_size=2,
        micro_batch_size=1,
        ppo_epochs=2,
        optimizer=adamw(1e-3),
        value_lr=3e-3,
        kl=KLPenalty(0.1, target=0.01, horizon=100),
    )
    rows = prompt_rows(12)
    data = PromptDataModule(folders["base"], rows, validation_data=rows[:3], rollout_batch_size=4, max_prompt_length=40)
    return module, data


def dpo(folders):
    module = DPOModule(
        folders["base"], sft_coef=0.1, optimizer=adamw(1e-3), warmup_steps=2, micro_batch_size=2, dropout=True
    )
    rows = preference_rows(12)
    return module, PreferenceDataModule(folders["base"], rows, validation_data=rows[:3], max_length=48, batch_size=4)


def groups(kind):
    def build(folders):
        module = kind(
            folders["base"],
            folders["reward"],
            sampling=Sampling(max_new_tokens=6, stop_strings=list("aeiou")),
            rollout_batch_size=4,
            samples_per_prompt=2,
            minibatch_size=4,
            micro_batch_size=2,
            ppo_epochs=2,
            optimizer=adamw(1e-3),
            kl=KLPenalty(0.1, target=0.01, horizon=100, estimator="k3"),
        )
        rows = prompt_rows(12)
        data = PromptDataModule(
            folders["base"], rows, validation_data=rows[:3], rollout_batch_size=4, max_prompt_length=40
        )
        return module, data

    return build


STAGES = {
    "sft": (sft, 1),
    "reward": (reward, 1),
    "ppo": (ppo, 4),
    "dpo": (dpo, 1),
    "rloo": (groups(RLOOModule), 4),
    "grpo": (groups(GRPOModule), 4),
}
"""What builds a stage anew, and its optimizer steps per batch."""


ONLINE = {"ppo": 4, "rloo": 8, "grpo": 8}
"""Stages that answer prompts, and the answers of each iteration."""


class Cut(Exception):
    """Ends a run."""


class KeepAll(ModelCheckpoint):
    """Writes a checkpoint after every batch and at every epoch's end."""

    def __init__(self, folder, steps_per_batch):
        super().__init__(folder, "{step}", every_n_train_steps=steps_per_batch, save_top_k=-1)


def run(stage, folders, checkpoints=None, cut_after=None, ckpt_path=None):
    """Fit with fresh objects and other global random numbers; the checkpoint that could be saved at the end."""
    build, steps_per_batch = STAGES[stage]
    disturb_random_numbers(1234 if ckpt_path is None else 99)
    module, data = build(folders)
    callbacks = [] if checkpoints is None else [KeepAll(checkpoints, steps_per_batch)]
    if cut_after is not None:
        step = module.training_step

        def training_step(batch, batch_idx):
            if module.trainer.global_step == cut_after * steps_per_batch:
                raise Cut
            step(batch, batch_idx)

        module.training_step = training_step
    log = fit(
        module,
        data,
        max_epochs=EPOCHS,
        val_check_interval=VALIDATION,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        ckpt_path=ckpt_path,
    )
    module.trainer.save_checkpoint(folders["base"] + "/end.ckpt")
    return log, torch.load(folders["base"] + "/end.ckpt", weights_only=True)


def assert_same(a, b, path=""):
    """Equal bit for bit, in every number of every level."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{number}")
    else:
        assert a == b, path


@pytest.fixture(scope="module", params=list(STAGES))
def whole(request, folders):
    """A stage's name, and what its uninterrupted run logs and ends with."""
    return request.param, *run(request.param, folders)


KEPT = ["state_dict", "optimizer_states", "lr_schedulers", "rlhf_lightning", "global_step", "epoch"]


@pytest.fixture(scope="module")
def cut(whole, folders, tmp_path_factory):
    """Checkpoints of a run of the same stage, from after each of its batches until it is cut."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(Cut):
        run(whole[0], folders, folder, max(WITHIN, AT_THE_END))
    return folder


@pytest.mark.parametrize("cut_after", [WITHIN, AT_THE_END])
def test_a_cut_run_ends_as_if_it_had_not_been_cut(whole, cut, folders, cut_after):
    stage, whole_log, end = whole
    steps_per_batch = STAGES[stage][1]

    log, resumed = run(stage, folders, ckpt_path=cut / f"step={cut_after * steps_per_batch}.ckpt")

    assert end["global_step"] == EPOCHS * BATCHES * steps_per_batch
    for name in KEPT:
        assert_same(resumed[name], end[name], name)
    for name in log.names("train") - {"tokens_per_second", "memory_gib"}:
        if not name.startswith("seconds"):
            # The checkpoint was saved before the numbers of its step were logged.
            assert log.series(f"train/{name}") == whole_log.series(f"train/{name}")[cut_after - 1 :], name
    for name in whole_log.names("val"):
        validated = (cut_after - 1) // VALIDATION
        assert log.series(f"val/{name}") == whole_log.series(f"val/{name}")[validated:], name


def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(whole, folders, tmp_path):
    """Stopped within an epoch, and saved after Lightning has closed that epoch."""
    stage, _, end = whole
    module, data = STAGES[stage][0](folders)
    disturb_random_numbers(1234)
    stop = LambdaCallback(on_train_batch_end=lambda trainer, *_: setattr(trainer, "should_stop", True))
    fit(module, data, max_epochs=EPOCHS, val_check_interval=VALIDATION, callbacks=[stop])
    module.trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    _, resumed = run(stage, folders, ckpt_path=tmp_path / "stopped.ckpt")

    for name in KEPT:
        assert_same(resumed[name], end[name], name)


def test_what_ends_training_is_made_up_for_after_a_cut_at_the_last_batch(folders, tmp_path):
    module, data = reward(folders)
    saver = KeepAll(tmp_path, 1)
    whole = fit(module, data, max_epochs=1, limit_val_batches=0, enable_checkpointing=True, callbacks=[saver])

    module, data = reward(folders)
    log = fit(module, data, max_epochs=1, ckpt_path=tmp_path / f"step={BATCHES}.ckpt")

    assert log.series("train/loss") == whole.series("train/loss")[-1:]  # not logged yet when it was saved
    assert module._calibrated_at == BATCHES


def test_a_finished_run_goes_on_with_the_learning_rate_of_its_step_in_the_longer_one(whole, folders, tmp_path):
    stage, whole_log, _ = whole
    module, data = STAGES[stage][0](folders)
    fit(module, data, max_epochs=1)
    module.trainer.save_checkpoint(tmp_path / "one epoch.ckpt")

    module, data = STAGES[stage][0](folders)
    log = fit(module, data, max_epochs=EPOCHS, ckpt_path=tmp_path / "one epoch.ckpt")

    assert log.series("train/lr") == whole_log.series("train/lr")[BATCHES:]
    assert min(log.series("train/lr")) > 0


def test_the_runs_have_something_to_remember(whole):
    """Otherwise the test above would show little."""
    stage, log, end = whole
    if stage in ONLINE:
        assert len(set(log.series("train/kl_coef"))) == EPOCHS * BATCHES
        assert end["rlhf_lightning"]["score_moments"]["count"] == EPOCHS * BATCHES * ONLINE[stage]
        assert len(log.series("val/score")) == EPOCHS
    else:
        assert len(set(log.series("train/lr"))) > 2
        assert len(log.series("val/loss")) == EPOCHS
    if stage == "reward":
        assert end["rlhf_lightning"]["calibration"]["mean"] != 0
        assert end["rlhf_lightning"]["calibrated_at"] == EPOCHS * BATCHES


def test_a_run_ends_at_other_weights_with_another_seed(whole, folders):
    """The random numbers do matter: with dropout, a fresh head or sampling they change the result."""
    stage, _, end = whole
    module, data = STAGES[stage][0](folders)
    disturb_random_numbers(7)
    fit(module, data, max_epochs=EPOCHS)
    assert any(not torch.equal(module.state_dict()[name], tensor) for name, tensor in end["state_dict"].items())


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    """A checkpoint of each stage after one step."""
    root = tmp_path_factory.mktemp("saved")
    for stage in STAGES:
        save_checkpoint(stage, folders, root / f"{stage}.ckpt")
    return {stage: root / f"{stage}.ckpt" for stage in STAGES}


@pytest.fixture(scope="module")
def other_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("others")
    bases = [save_llama(root / name, hidden_size=int(name)) for name in ("16", "32")]  # another family, another size
    return [{"base": base, "reward": save_reward_model(Path(f"{base} reward"), base)} for base in bases]


@pytest.mark.parametrize(("other", "stage"), itertools.permutations(STAGES, 2))
def test_the_checkpoint_of_another_stage_is_refused(folders, saved, other, stage):
    refuses(stage, folders, saved[other], "it was made with another model or stage")


@pytest.mark.parametrize("stage", list(STAGES))
def test_the_checkpoint_of_another_model_is_refused(saved, other_folders, tmp_path, stage):
    other_family, other_size = other_folders
    refuses(stage, other_family, saved[stage], "it was made with another model or stage")
    save_checkpoint(stage, other_family, tmp_path / "saved.ckpt")
    refuses(stage, other_size, tmp_path / "saved.ckpt", "it was made with another model or stage")


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_checkpoint_that_is_not_of_this_package_is_refused(folders, saved, tmp_path, stage):
    checkpoint = torch.load(saved[stage], weights_only=True)
    del checkpoint["rlhf_lightning"]
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    refuses(stage, folders, tmp_path / "foreign.ckpt", "the checkpoint was not made by this package")


def save_checkpoint(stage, folders, path):
    module, data = STAGES[stage][0](folders)
    fit(module, data, max_steps=1, limit_val_batches=0)
    module.trainer.save_checkpoint(path)


def refuses(stage, folders, path, message):
    module, data = STAGES[stage][0](folders)
    with pytest.raises(UserError, match=message) as error:
        fit(module, data, ckpt_path=path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_a_reward_given_in_python_holds_plain_data_only(folders, tmp_path):
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "sampling": Sampling(max_new_tokens=4)}
    settings = {"validation_split": 0.0, "rollout_batch_size": 4, "max_prompt_length": 40}
    data = PromptDataModule(folders["base"], prompt_rows(8), **settings)
    run = trainer()
    run.fit(PPOModule(folders["base"], share_of_letters, **sizes), data)
    run.save_checkpoint(tmp_path / "ppo.ckpt")
    assert torch.load(tmp_path / "ppo.ckpt", weights_only=True)["rlhf_lightning"]["iteration"] == 2
