"""What Lightning keeps to itself is as it was; each test says what would break here if it were not."""

import inspect
import signal
import sys

import pytest
import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from rlhf_lightning import FSDP2Strategy, lightning_compat


def test_validation_data_are_loaded_when_no_validation_has_been(tmp_path):
    """Else a reward model whose run ends before its first validation would stay uncalibrated."""
    states = []

    class Watched(BoringModel):
        def on_train_end(self):
            states.append(self.trainer.val_dataloaders)
            states.append(lightning_compat.validation_loader(self.trainer))
            states.append(self.trainer.state.stage)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    trainer = pl.Trainer(
        max_steps=1, check_val_every_n_epoch=9, num_sanity_val_steps=0, accelerator="cpu", default_root_dir=tmp_path,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(Watched())
    assert states[0] is None
    assert next(iter(states[1])).shape == (1, 32)
    assert states[2] == "train"


def test_training_data_can_be_loaded_before_the_run(tmp_path):
    """Else DPO's reference could not read the pairs beforehand in a run that is limited by max_steps alone."""
    seen = []

    class Watched(BoringModel):
        def on_fit_start(self):
            lightning_compat.load_training_data(self.trainer)
            seen.append(len(self.trainer.train_dataloader.dataset))

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 1}
    pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **options).fit(Watched())
    assert seen == [64]


def test_a_trainer_tells_whether_it_was_given_a_checkpoint_io():
    """Else checkpoints would be written as Lightning writes them, or somebody's own way of writing be taken away."""
    assert not lightning_compat.was_given_checkpoint_io(pl.Trainer(accelerator="cpu", logger=False))
    given = pl.Trainer(accelerator="cpu", logger=False, plugins=[TorchCheckpointIO()])
    assert lightning_compat.was_given_checkpoint_io(given)


def test_a_trainer_can_be_kept_from_handling_signals(tmp_path):
    """Else SIGTERM would make one process talk to others that do not listen, and all of them wait."""
    seen = []

    class Watched(BoringModel):
        def on_train_start(self):
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    for alone in (True, False):
        trainer = pl.Trainer(fast_dev_run=1, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
        lightning_compat.leave_signals_alone(trainer)
        lightning_compat.leave_signals_alone(trainer, alone)
        trainer.fit(Watched())
    assert seen[0] == before != seen[1]


def test_a_last_checkpoint_is_written_whatever_the_callback_is_set_to_save(tmp_path):
    """Else a run that is stopped would end without one, or keep the callback from its own at the same step."""
    callback = pl.callbacks.ModelCheckpoint(tmp_path, "own", save_weights_only=True, every_n_epochs=1)
    paths = []

    class Watched(BoringModel):
        def on_train_batch_end(self, *_):
            paths.append(lightning_compat.save_last(callback, self.trainer))
            assert lightning_compat.last_path(callback) == paths[-1] == str(tmp_path / "last.ckpt")

    options = {"logger": False, "enable_progress_bar": False, "max_epochs": 1, "limit_train_batches": 2}
    pl.Trainer(accelerator="cpu", callbacks=[callback], enable_model_summary=False, **options).fit(Watched())
    saved = {path.name: torch.load(path, weights_only=True) for path in tmp_path.iterdir()}
    assert {*saved} == {"own.ckpt", "last.ckpt"}
    assert "optimizer_states" in saved["last.ckpt"]
    assert "optimizer_states" not in saved["own.ckpt"]
    assert callback.save_last is None


@pytest.mark.parametrize(("before", "saved"), [(2, ["own.ckpt"]), (3, [])])
def test_a_checkpoint_callback_saves_where_a_multiple_was_passed(tmp_path, before, saved):
    """Else a batch of several optimizer steps would pass over what its callback waits for."""
    callback = pl.callbacks.ModelCheckpoint(tmp_path, "own", every_n_train_steps=3)

    class Watched(BoringModel):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3:  # after 4 steps
                for path in tmp_path.iterdir():
                    path.unlink()  # of the third
                lightning_compat.save_where_passed(callback, self.trainer, before)
                assert [path.name for path in tmp_path.iterdir()] == saved

    options = {"logger": False, "enable_progress_bar": False, "max_epochs": 1, "limit_train_batches": 4}
    pl.Trainer(accelerator="cpu", callbacks=[callback], enable_model_summary=False, **options).fit(Watched())


def test_steps_of_the_optimizer_are_counted_from_their_beginning(tmp_path):
    """Else one that failed halfway would look as if nothing had changed."""
    seen = []

    class Watched(BoringModel):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.optimizer.step = self.fail
            with pytest.raises(RuntimeError):
                optimizer.step()
            seen.append((lightning_compat.optimizer_steps_begun(self.trainer), self.trainer.global_step))

        def fail(self, *_, **__):
            raise RuntimeError

    pl.Trainer(fast_dev_run=1, accelerator="cpu", enable_progress_bar=False).fit(Watched())
    assert seen == [(1, 0)]


class Seen(pl.Callback):
    """Asks at each hook what Lightning has yet to log, and whether a batch is under way."""

    def __init__(self):
        self.told = []

    def tell(self, trainer, hook, ends_epoch=False):
        metrics, step = lightning_compat.metrics_to_log(trainer, ends_epoch)
        self.told.append((hook, lightning_compat.is_within_batch(trainer), sorted(metrics), step))

    def on_train_batch_start(self, trainer, *_):
        self.tell(trainer, "start")

    def on_train_batch_end(self, trainer, *_):
        self.tell(trainer, "end")

    def on_validation_end(self, trainer, *_):
        self.tell(trainer, "validated")

    def on_train_epoch_end(self, trainer, *_):
        self.tell(trainer, "epoch", ends_epoch=True)


class LoggingModel(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("step", float(batch_idx), on_step=True, on_epoch=False)
        self.log("value", 1.0, on_step=True, on_epoch=False)
        self.log("mean", 1.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_a_trainer_tells_what_it_has_yet_to_log():
    """Else a run that is killed after a checkpoint would lack the numbers of its step, or have others twice."""
    seen = Seen()
    settings = {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 1, "log_every_n_steps": 1}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = pl.Trainer(callbacks=[seen], accelerator="cpu", enable_checkpointing=False, **settings, **quiet)
    run.fit(LoggingModel())

    assert seen.told[1:] == [  # the first hook is that of the validation before training
        ("start", True, [], 0),
        ("end", False, ["epoch", "value"], 0),
        ("start", True, [], 0),
        ("end", False, ["epoch", "value"], 1),
        ("validated", False, [], 0),
        ("epoch", False, ["epoch", "mean"], 1),
    ]


class EndAtOnce(pl.Callback):
    """Takes the epoch that begins for one that was resumed after its last batch."""

    def __init__(self):
        self.hooks = []

    def on_train_start(self, trainer, pl_module):
        trainer.fit_loop.epoch_loop.restarting = True
        lightning_compat.go_on_after_batch(trainer, validates=False, is_over=True)

    def on_train_batch_start(self, *_):
        self.hooks.append("batch")

    def on_validation_start(self, trainer, pl_module):
        self.hooks.append("validation")

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.fit_loop.epoch_loop.restarting = False
        self.hooks.append("epoch end")


def test_an_epoch_ends_without_a_batch_where_all_were_made():
    """Else a run that is resumed after its last step would make one more, or leave out what ends an epoch."""
    seen = EndAtOnce()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    run = pl.Trainer(callbacks=[seen], accelerator="cpu", enable_checkpointing=False, max_epochs=1, **quiet)
    run.fit(BoringModel())
    assert seen.hooks == ["epoch end"]
    assert run.global_step == 0


class StopAfterOne(EndAtOnce):
    """Asks the trainer to stop as if its first batch had been the last one of a run that was stopped."""

    def on_train_start(self, trainer, pl_module):
        assert lightning_compat.can_stop_early(trainer)
        lightning_compat.stop_with_validation(trainer)
        assert not trainer.should_stop

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        lightning_compat.put_advance_back(trainer)
        lightning_compat.put_advance_back(trainer)


def test_a_trainer_that_is_asked_within_a_batch_validates_and_stops():
    """Else a run that a callback has ended would leave out its last validation when it is resumed."""
    seen = StopAfterOne()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    run = pl.Trainer(callbacks=[seen], accelerator="cpu", enable_checkpointing=False, max_epochs=2, **quiet)
    run.fit(BoringModel())
    assert seen.hooks == ["batch", "validation", "epoch end"]
    assert run.current_epoch == 1
    assert "advance" not in vars(run.fit_loop.epoch_loop)

    lightning_compat.count_epoch(run)
    assert run.current_epoch == 2


def test_a_trainer_lets_processes_fail_that_it_has_started(monkeypatch):
    """Else it would kill this process by SIGKILL, before it could say which one has failed, and why."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # which the launcher sets, put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(lightning_compat.subprocess_script, "_basic_subprocess_cmd", lambda: [sys.executable, "-c", ""])
    observed = []
    monkeypatch.setattr(lightning_compat.subprocess_script, "_launch_process_observer", observed.append)

    def launched():
        trainer = pl.Trainer(strategy="ddp", devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
        children = lightning_compat.launched_children(trainer)
        assert children() == []
        trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
        (child,) = children()
        assert child.wait() == 0
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    launched()
    assert len(observed) == 1
    with lightning_compat.leave_children_alone():
        launched()
    assert len(observed) == 1
    assert lightning_compat.launched_children(pl.Trainer(accelerator="cpu", devices=1, logger=False)) is None


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_was_started_starts_none_itself(monkeypatch, strategy, rank):
    """Strategies differ in whether it has a launcher; the others would wait for one that is left out."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    for known in (rank_zero_only, utils_rank_zero_only):  # a trainer tells them its rank
        monkeypatch.setattr(known, "rank", 0)
    chosen = FSDP2Strategy() if strategy == "fsdp2" else strategy
    trainer = pl.Trainer(strategy=chosen, devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert trainer.global_rank == rank
    children = lightning_compat.launched_children(trainer)
    assert children is not None
    assert children() == []


def test_every_name_has_a_test():
    """So that what is added to the module is not added without saying what it holds up."""
    written = inspect.getsource(inspect.getmodule(test_every_name_has_a_test))
    for name, value in vars(lightning_compat).items():
        ours = getattr(value, "__module__", None) == lightning_compat.__name__ or name.isupper()
        if ours and not name.startswith("_"):
            assert f"lightning_compat.{name}" in written, name


def test_a_metric_that_a_step_lacks_is_not_logged_as_it_was(tmp_path):
    """Else the score of a source without a prompt would be that of an earlier iteration."""
    logged = []

    class Watched(BoringModel):
        def training_step(self, batch, batch_idx):
            lightning_compat.forget_metrics(self.trainer, ["some"] if batch_idx == 1 else [])
            self.log("train/all", float(batch_idx))
            if batch_idx != 1:
                self.log("train/some", float(batch_idx))
            return super().training_step(batch, batch_idx)

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append({name: value for name, value in metrics.items() if name.startswith("train/")})

    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, log_every_n_steps=1, limit_val_batches=0, logger=Logger(),
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(Watched())
    assert logged[:3] == [
        {"train/all": 0.0, "train/some": 0.0},
        {"train/all": 1.0},
        {"train/all": 2.0, "train/some": 2.0},
    ]
