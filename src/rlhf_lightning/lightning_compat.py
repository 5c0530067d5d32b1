"""What this package uses of Lightning that it calls private or may rename, each in one place.

`tests/test_lightning_compat.py` has a test for each, which says what would break here if it changed there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from subprocess import Popen
from typing import Any

from lightning_fabric.utilities.apply_func import convert_tensors_to_scalars
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher, subprocess_script


def load_training_data(trainer: Trainer) -> None:
    """What Lightning does before a run's first batch, for what must see the data before; twice does nothing more."""
    trainer.fit_loop.setup_data()


def validation_loader(trainer: Trainer) -> Any:
    """What a run validates with, loaded as before its first validation if none has been; nothing where there is none.

    Args:
        trainer: in a fit.
    """
    if trainer.val_dataloaders is None and trainer.enable_validation:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    return trainer.val_dataloaders


def was_given_checkpoint_io(trainer: Trainer) -> bool:
    """Whether somebody chose how a trainer writes checkpoints, which otherwise is decided when it is asked for."""
    return trainer.strategy._checkpoint_io is not None


def leave_signals_alone(trainer: Trainer, alone: bool = True) -> None:
    """Keep a trainer from handling signals: its handler of SIGTERM talks to other processes wherever it is called.

    Args:
        trainer: changed in place.
        alone: False to let it handle them again.
    """
    connector: Any = trainer._signal_connector
    if alone:
        connector.register_signal_handlers = _nothing
    else:
        vars(connector).pop("register_signal_handlers", None)


def _nothing() -> None:
    return


def launched_children(trainer: Trainer) -> Callable[[], list[Popen[Any]]] | None:
    """The processes that a trainer starts by the command that started this one; None if it starts others, or in itself.

    Args:
        trainer: built.

    Returns:
        Gives those that run, and those that have ended; none before they are started, or where something else does it.
    """
    launcher, environment = trainer.strategy.launcher, getattr(trainer.strategy, "cluster_environment", None)
    if launcher is None and environment is not None and environment.creates_processes_externally:
        return list  # a process that was started, by some strategies
    return (lambda: launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else None


@contextmanager
def leave_children_alone() -> Iterator[None]:
    """Keep trainers, for the length of a `with` block, from killing this process when one that they started fails."""
    before = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = lambda child_processes: None
    try:
        yield
    finally:
        subprocess_script._launch_process_observer = before


def save_last(callback: ModelCheckpoint, trainer: Trainer) -> str:
    """Write a checkpoint callback's `last`, whatever it is set to save, and let it save as before afterwards.

    Args:
        callback: of the trainer.
        trainer: in a fit.

    Returns:
        The path of the checkpoint.
    """
    # It writes nothing more at a step that it has saved at, which is for its own checkpoints.
    kept = ("save_last", "save_weights_only", "_last_global_step_saved", "_last_checkpoint_saved")
    before = {name: getattr(callback, name) for name in kept}
    callback.save_last, callback.save_weights_only = True, False
    try:
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    finally:
        vars(callback).update(before)
    return callback.last_model_path


def save_where_passed(callback: ModelCheckpoint, trainer: Trainer, before: int) -> None:
    """Let a checkpoint callback save if the steps of a batch have passed over a multiple of `every_n_train_steps`.

    Where they have reached one it saves by itself.

    Args:
        callback: of the trainer.
        trainer: at the end of a training batch.
        before: optimizer steps at the end of the one before.
    """
    every, now = callback._every_n_train_steps, trainer.global_step
    passed = every > 0 and now // every > before // every and now % every
    if not passed or callback._should_skip_saving_checkpoint(trainer):
        return
    candidates = callback._monitor_candidates(trainer)
    if callback.monitor is not None and callback.monitor not in candidates:
        callback._defer_save_until_validation = True  # which measures it
        return
    callback._save_topk_checkpoint(trainer, candidates)
    callback._save_last_checkpoint(trainer, candidates)


def last_path(callback: ModelCheckpoint) -> str:
    """Where a checkpoint callback writes its `last`, if nothing is there yet."""
    return callback.format_checkpoint_name({}, callback.CHECKPOINT_NAME_LAST)


def optimizer_steps_begun(trainer: Trainer) -> int:
    """Steps of the optimizer in manual optimisation, with one that an exception ended."""
    return int(trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.ready)


def is_within_batch(trainer: Trainer) -> bool:
    """Whether a training batch has begun and its `training_step` has not returned."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(progress.processed < progress.ready)


def metrics_to_log(trainer: Trainer, ends_epoch: bool) -> tuple[dict[str, float], int]:
    """What `self.log` was given and Lightning has yet to give to the loggers, and the step that it names there.

    Args:
        trainer: in `on_train_batch_end` there are those of the batch; elsewhere there are none, but
        ends_epoch: in `on_train_epoch_end` there are those of the epoch.
    """
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.current
    ends_batch = progress.completed < progress.processed == progress.ready
    if not (ends_epoch or (ends_batch and connector.should_update_logs)) or not trainer.training:
        return {}, 0
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    step = metrics.pop("step", None)
    if not metrics:
        return {}, 0
    metrics.setdefault("epoch", trainer.current_epoch)
    return metrics, int(step) if step is not None else loop._batches_that_stepped - ends_epoch


def forget_metrics(trainer: Trainer, names: Collection[str]) -> None:
    """Do not log again what an earlier step of the epoch has logged, and this one has not.

    Args:
        trainer: within a training step.
        names: of the metrics, without `train/`.
    """
    wanted = {f"train/{name}" for name in names}
    results: dict[str, Any] = trainer._results or {} if wanted else {}
    for metric in results.values():
        if metric.meta.name in wanted:
            metric.reset()


def stop_with_validation(trainer: Trainer) -> None:
    """Let a resumed epoch see that training was asked to stop as late as the epoch that was cut did.

    Lightning asks before a batch, and there the loop would leave at once, without the validation that it makes after
    the last batch of a run that is stopped.

    Args:
        trainer: in `on_train_start`, before `go_on_after_batch`.
    """
    loop = trainer.fit_loop.epoch_loop

    def advance(fetcher: Any) -> None:
        trainer.should_stop = True
        type(loop).advance(loop, fetcher)

    loop.__dict__["advance"] = advance


def put_advance_back(trainer: Trainer) -> None:
    """Undo `stop_with_validation`; nothing if it was not done.

    Args:
        trainer: of the run.
    """
    trainer.fit_loop.epoch_loop.__dict__.pop("advance", None)


def count_epoch(trainer: Trainer) -> None:
    """Count the running epoch as over, as Lightning does after the hooks of its end, also of one that was stopped."""
    trainer.fit_loop.epoch_progress.increment_processed()
    trainer.fit_loop.epoch_progress.increment_completed()


def can_stop_early(trainer: Trainer) -> bool:
    """Whether `should_stop` ends training now, as `min_epochs` and `min_steps` are reached."""
    return trainer.fit_loop._can_stop_early


def go_on_after_batch(trainer: Trainer, validates: bool, is_over: bool) -> None:
    """Let a resumed epoch go on with what follows on the last batch that was made: validation, next batch, or its end.

    Args:
        trainer: in `on_train_start`; its counters say that the batch is completed.
        validates: the validation that may be due is to run.
        is_over: no more batches are to be made, though the epoch has more.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    is_due = loop._should_check_val_fx(fetcher)
    is_over = is_over or loop._num_ready_batches_reached()
    loop.batch_progress.is_last_batch = is_over
    if is_due and validates:
        return
    if is_over:
        loop.val_loop._has_run = True  # else one more batch would be asked for
    if (is_over or not is_due) and not loop._should_accumulate():
        loop._batches_that_stepped += 1  # elsewhere the loop counts by itself
