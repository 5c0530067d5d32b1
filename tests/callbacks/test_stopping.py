"""A run that is asked to stop loses nothing: it ends after a batch, with a checkpoint that goes on exactly."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, LambdaCallback, ModelCheckpoint
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from transformers import AutoModelForCausalLM

from helpers.stages import (
    MemoryLogger,
    adamw,
    disturb_random_numbers,
    instruction_rows,
    prompt_rows,
    save_llama,
    save_reward_model,
    trainer,
    weights,
)
from helpers.stopped import SignalAt
from rlhf_lightning import (
    HFExport,
    InstructionDataModule,
    KLPenalty,
    PPOModule,
    PromptDataModule,
    Sampling,
    SFTModule,
    Stopping,
    UserError,
)
from rlhf_lightning.runs.signals import SignalWatch, Stopped


@pytest.fixture(autouse=True)
def sigint_is_heard():
    """Processes that a shell starts in the background ignore SIGINT from the start, and SIGHUP after `nohup`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = save_llama(root / "base", hidden_size=16)
    return {"base": base, "reward": save_reward_model(root / "reward", base)}


def sft(folders):
    rows = instruction_rows(12)
    module = SFTModule(folders["base"], optimizer=adamw(1e-3), micro_batch_size=2)
    data = InstructionDataModule(
        folders["base"], rows, validation_data=rows[:6], max_length=48, batch_size=4, eval_batch_size=2
    )
    return module, data


def ppo(folders):
    module = PPOModule(
        folders["base"],
        folders["reward"],
        sampling=Sampling(max_new_tokens=4),
        rollout_batch_size=4,
        minibatch_size=2,
        micro_batch_size=2,
        ppo_epochs=1,
        optimizer=adamw(1e-3),
        kl=KLPenalty(0.1, target=0.01, horizon=100),
    )
    rows = prompt_rows(12)
    data = PromptDataModule(
        folders["base"],
        rows,
        validation_data=rows[:6],
        rollout_batch_size=4,
        eval_batch_size=2,
        max_prompt_length=40,
    )
    return module, data


BUILD = {"sft": (sft, 1), "ppo": (ppo, 2)}
"""What builds a stage anew, and its optimizer steps per batch."""


def run(stage, folders, folder, *callbacks, saver=None, stopping=None, **settings):
    """Fit with fresh objects and other global random numbers; what was logged, and the trainer's model."""
    disturb_random_numbers(len(str(settings)))
    torch.manual_seed(5)
    module, data = BUILD[stage][0](folders)
    settings = {"max_epochs": 2, "val_check_interval": 1, "default_root_dir": folder} | settings
    saver = saver or ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=10**6)
    callbacks = [*callbacks, stopping or Stopping(), saver]
    checkpoint = settings.pop("ckpt_path", None)
    logger = Steps()
    run = trainer(enable_checkpointing=True, callbacks=callbacks, logger=logger, **settings)
    run.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return logger.values, weights(module)


class Steps(MemoryLogger):
    """Remembers each value with its step, but for what a clock says."""

    def __init__(self):
        super().__init__()
        self.values = set()

    def log_metrics(self, metrics, step=None):
        told = {name: value for name, value in metrics.items() if not _OF_A_CLOCK.search(name)}
        self.values |= {(name, step, value) for name, value in told.items()}


_OF_A_CLOCK = re.compile("second|memory")


def stopped(*args, code=143, **kwargs):
    """What was logged in a run that ends with an exit code."""
    values = set()
    note = LambdaCallback(on_exception=lambda trainer, *_: values.update(trainer.logger.values))
    stage, folders, folder, *callbacks = args
    with pytest.raises(SystemExit) as error:
        run(stage, folders, folder, note, *callbacks, **kwargs)
    assert error.value.code == code
    return values


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """What the undisturbed run of a stage logs and ends with."""
    return {stage: run(stage, folders, tmp_path_factory.mktemp("whole")) for stage in BUILD}


@pytest.mark.parametrize(
    ("stage", "hook", "batch", "name"),
    [
        ("sft", "on_train_batch_start", 1, "SIGTERM"),  # finishes the batch, and begins no validation
        ("ppo", "on_train_batch_start", 1, "SIGINT"),
        ("sft", "on_train_batch_start", 2, "SIGHUP"),  # of a terminal that hangs up
        ("sft", "on_train_batch_end", 3, "SIGINT"),  # at an epoch's end
        ("sft", "on_validation_batch_start", 2, "SIGTERM"),
        ("sft", "on_validation_batch_start", 3, "SIGTERM"),
        ("ppo", "on_validation_batch_start", 3, "SIGTERM"),
        ("sft", "on_validation_end", 4, "SIGTERM"),
    ],
)
def test_stopped_and_resumed_is_as_never_stopped(whole, folders, tmp_path, stage, hook, batch, name):
    logged, learnt = whole[stage]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    send = SignalAt(hook, batch * BUILD[stage][1], [name])
    first = stopped(stage, folders, tmp_path, send, code={"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}[name])

    assert {number: signal.getsignal(number) for number in before} == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    rest, ended = run(stage, folders, tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert first | rest == logged
    assert len({value[:2] for value in logged}) == len(logged)
    assert all(torch.equal(ended[key], learnt[key]) for key in learnt)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_is_saved_in_a_validation_of_averaged_weights_is_what_is_trained(folders, tmp_path):
    averaging = partial(EMAWeightAveraging, decay=0.5)
    _, learnt = run("sft", folders, tmp_path / "whole", averaging())
    stopped("sft", folders, tmp_path / "cut", averaging(), SignalAt("on_validation_batch_start", 2))
    _, ended = run("sft", folders, tmp_path / "cut", averaging(), ckpt_path=tmp_path / "cut/last.ckpt")
    assert all(torch.equal(ended[key], learnt[key]) for key in learnt)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_start"])
def test_before_training_a_run_ends_at_once(folders, tmp_path, hook, capsys):
    begun = []
    note = LambdaCallback(on_train_start=lambda *_: begun.append(1))
    stopped("sft", folders, tmp_path, note, SignalAt(hook), num_sanity_val_steps=1)
    assert not begun
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped by SIGTERM after 0 optimizer steps; no checkpoint was saved, so start it again"
    )


def test_the_last_lines_say_what_happens_and_how_to_go_on(folders, tmp_path, capfd):
    stopped("sft", folders, tmp_path, SignalAt("on_train_batch_start", 1, ["SIGTERM", "SIGTERM"]))
    first, _, second = capfd.readouterr().err.splitlines()[-3:]
    assert first == "SIGTERM: finishing the batch, then saving; Ctrl-C once more ends the run at once"
    assert second == (
        f"stopped by SIGTERM after 2 optimizer steps; go on from '{tmp_path}/last.ckpt' by adding --ckpt_path auto to "
        "the same command"
    )


def test_a_second_ctrl_c_ends_the_run_at_once(folders, tmp_path, capfd):
    send = SignalAt("on_train_batch_start", 1, ["SIGINT", "SIGINT"])
    before = signal.getsignal(signal.SIGINT)
    stopped("sft", folders, tmp_path, send, code=1)  # Lightning's, which the command line turns into 130
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err.splitlines()[-1].startswith("stopped by SIGINT, at once after 1 optimizer steps")


@pytest.mark.parametrize(("hook", "step"), [("on_train_batch_start", 5), ("on_validation_start", 6), ("on_fit_end", 6)])
def test_after_the_last_batch_a_run_is_completed_first(folders, tmp_path, hook, step):
    ended = []
    note = LambdaCallback(on_fit_end=lambda *_: ended.append(1))
    with SignalWatch() as watch:
        run("sft", folders, tmp_path, SignalAt(hook, step), note)
        assert watch.received == "SIGTERM"
    assert ended


def test_a_signal_of_the_last_moments_reaches_whom_it_is_for(folders, tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        run("sft", folders, tmp_path, SignalAt("on_fit_end", 6))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_a_validation_by_itself_ends_at_once(folders, tmp_path, capsys):
    module, data = sft(folders)
    send = SignalAt("on_validation_batch_start")
    with pytest.raises(Stopped) as error:
        trainer(callbacks=[Stopping(), send]).validate(module, data)
    assert error.value.code == 143
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM"


def test_saves_every_few_minutes_and_lets_the_callback_keep_what_it_would(folders, tmp_path):
    kept = {}
    for minutes in (None, 1e-9):
        folder = tmp_path / str(minutes)
        saver = ModelCheckpoint(folder, "{step}", monitor="val/loss", save_top_k=2, every_n_train_steps=4)
        epochs = ModelCheckpoint(folder, "epoch={epoch}", every_n_epochs=1, save_on_train_epoch_end=True)
        names = []
        watch = LambdaCallback(
            on_train_batch_end=lambda *_, folder=folder, names=names: names.append((folder / "last.ckpt").exists())
        )
        run("sft", folders, folder, epochs, watch, saver=saver, stopping=Stopping(minutes))
        kept[minutes] = {path.name for path in folder.iterdir()}
        assert names == [minutes is not None and i > 0 for i in range(6)]
        assert {Path(path).name for path in saver.best_k_models} | {"epoch=epoch=1.ckpt"} <= kept[minutes]
    assert kept[1e-9] == {*kept[None], "last.ckpt"}


def test_without_a_checkpoint_callback_nothing_is_written(folders, tmp_path, capsys):
    module, data = sft(folders)
    send = SignalAt("on_train_batch_start", 1)
    with pytest.raises(Stopped):
        trainer(callbacks=[Stopping(), send], default_root_dir=tmp_path).fit(module, data)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.splitlines()[-1].endswith("no checkpoint was saved, so start it again")


def test_a_link_to_another_checkpoint_is_replaced_and_not_followed(folders, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_last="link", every_n_train_steps=1, save_top_k=1)
    other = ModelCheckpoint(tmp_path, "first", every_n_train_steps=4)
    stopped("sft", folders, tmp_path, SignalAt("on_train_batch_start", 1), other, saver=saver, stopping=Stopping(1e-9))
    saved = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.iterdir()}
    assert saved == {"step=2.ckpt": 2, "last.ckpt": 2}


def test_an_export_beside_the_checkpoint_is_of_the_same_weights(folders, tmp_path):
    export = HFExport(with_checkpoints=True)
    stopped("sft", folders, tmp_path, export, SignalAt("on_validation_batch_start", 2))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "last-hf").state_dict()
    assert all(torch.equal(saved[f"model.{name}"], model[name]) for name in model)


class Failed(Exception):
    pass


def failing(hook, step):
    def fail(trainer, *_):
        if trainer.global_step == step:
            raise Failed

    return LambdaCallback(**{hook: fail})


@pytest.mark.parametrize(
    ("stage", "hook", "batch"), [("ppo", "on_train_batch_start", 2), ("sft", "on_validation_batch_start", 2)]
)
def test_an_exception_that_changed_nothing_leaves_the_last_batch_saved(whole, folders, tmp_path, stage, hook, batch):
    _, learnt = whole[stage]
    with pytest.raises(Failed):
        run(stage, folders, tmp_path, failing(hook, batch * BUILD[stage][1]))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == batch * BUILD[stage][1]
    _, ended = run(stage, folders, tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(ended[key], learnt[key]) for key in learnt)


@pytest.mark.parametrize("part", ["rollout", "optimise"])
def test_an_exception_within_an_iteration_that_has_changed_something_leaves_nothing(
    folders, tmp_path, monkeypatch, part
):
    """Neither after the first of its optimizer steps, nor when only the moments of the scores have moved."""
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(1)
        result = before(self, *args, **kwargs)
        if len(calls) == {"optimise": 4, "rollout": 2}[part]:
            raise Failed
        return result

    before = getattr(PPOModule, part)
    monkeypatch.setattr(PPOModule, part, fail)
    with pytest.raises(Failed):
        run("ppo", folders, tmp_path)
    assert not list(tmp_path.iterdir())


def test_slurm_is_asked_to_run_the_job_again(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\nls {tmp_path}/run > "{tmp_path}/there"; echo "$@" >> "{tmp_path}/asked"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    stopped("sft", folders, tmp_path / "run", SignalAt("on_train_batch_start", 1, ["SIGUSR1"]))
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert (tmp_path / "there").read_text() == "last.ckpt\n"

    scontrol.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    with pytest.warns(UserWarning, match=r"job 17 into its queue again: no such job; submit it"):
        stopped("sft", folders, tmp_path / "next", SignalAt("on_train_batch_start", 1, ["SIGUSR1"]))


def test_a_checkpoint_of_lightnings_handler_is_refused(folders, tmp_path):
    module, data = sft(folders)
    first = trainer(callbacks=[Stopping()], max_epochs=1)
    first.fit(module, data)
    first.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    with pytest.raises(UserError, match=r"hpc_ckpt_1.ckpt' was written by Lightning's handler"):
        run("sft", folders, tmp_path, ckpt_path=tmp_path / "hpc_ckpt_1.ckpt")


def test_too_little_room_is_said_before_the_first_step(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.callbacks.stopping.free_space", lambda folder: 300_000)
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=2, monitor="val/loss")
    with pytest.raises(UserError, match=r"has 0.3 MB free, and the checkpoints of this run need 0.8 MB: 4 of 0.2 MB"):
        run("sft", folders, tmp_path, saver=saver)
    assert not list(tmp_path.iterdir())


def test_lightning_takes_signals_again_afterwards(folders):
    module, data = sft(folders)
    run = trainer(callbacks=[Stopping()], max_epochs=1)
    run.fit(module, data)
    assert run._signal_connector.register_signal_handlers.__func__ is _SignalConnector.register_signal_handlers
