"""Where a run begins: at a checkpoint that was named, at the newest whole one of its folder, or at the beginning."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from rlhf_lightning.callbacks.run_folder import checkpoint_folders
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import check_whole, checkpoints_in, newest_whole, said_time
from rlhf_lightning.runs.ending import MARK, steps_when_finished
from rlhf_lightning.runs.lock import remove_left_lock
from rlhf_lightning.runs.peers import Peers

LAST, AUTO = "last", "auto"
_LATE = 10.0  # seconds


def check_ckpt_path(command: str, path: str) -> None:
    """Refuse a checkpoint that is not there or not whole, before anything is loaded or written.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        path: a file, a folder (DeepSpeed), `last` or `auto`.

    Raises:
        UserError: it cannot be used.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return  # the first process says it for all, and `begin_together` compares
    if path in (LAST, AUTO):
        if path == AUTO and command != "fit":
            raise UserError(f"--ckpt_path auto is for fit, which can also start; {command} takes last, or a .ckpt file")
        return
    if path in ("best", "hpc"):
        raise UserError(
            f"--ckpt_path {path}: Lightning's word means nothing to a new process; pass last, or a .ckpt file"
        )
    if not Path(path).exists():
        raise UserError(f"--ckpt_path: '{path}' does not exist; pass a .ckpt file, or last")
    if (Path(path) / "config.json").exists() or path.endswith(".safetensors"):
        raise UserError(f"--ckpt_path: '{path}' is no Lightning checkpoint; a model goes to --model.model_name_or_path")
    try:
        check_whole(path, to_train=command == "fit")
    except UserError as e:
        raise UserError(f"--ckpt_path: {e}") from e


def is_over(config: Any, trainer: pl.Trainer, limits: dict[str, float | None]) -> bool:
    """Whether a run that is to go on has ended, within limits as high as those of now; says so and leaves it alone.

    Args:
        config: of `fit`.
        trainer: built from it.
        limits: what `limits_of` says of it.
    """
    if config.ckpt_path not in (LAST, AUTO) or config.overwrite or config.trainer.fast_dev_run:
        return False
    root = Path(trainer.default_root_dir)
    steps = steps_when_finished(root, limits)
    if steps is not None and trainer.is_global_zero:
        remove_left_lock(root)  # of a run that was killed after its last word
        print(
            f"'{root}' is finished after {steps} optimizer steps, nothing is left to do; to train on, raise "
            "--trainer.max_epochs, max_steps or max_time"
        )
    return steps is not None


def where_to_begin(config: Any, trainer: pl.Trainer) -> str | None:
    """The checkpoint that a run goes on from; None for the beginning.

    Args:
        config: of `fit`.
        trainer: built from it.

    Raises:
        UserError: there is nothing to go on from, or something that a start would destroy.
    """
    given: str | None = config.ckpt_path
    if given not in (LAST, AUTO):
        if given is None and not config.overwrite and not config.trainer.fast_dev_run:
            _refuse_earlier_run(trainer)
        return given
    if given == AUTO and config.overwrite:
        raise UserError("--ckpt_path auto goes on where --overwrite true starts anew; leave one of them out")
    path = _newest(given, trainer, to_train=True)
    if path is None:
        _refuse_earlier_run(trainer)
    return path


def begin_together(config: Any, trainer: pl.Trainer, peers: Peers | None) -> str | None:
    """The checkpoint that all processes of a run go on from, which the first one chooses; None for the beginning.

    Args:
        config: of `fit`.
        trainer: built from it.
        peers: the other processes, if any.

    Raises:
        UserError: as `where_to_begin`; or this process sees another disk than the first one.
    """
    return _together(config.ckpt_path, lambda: where_to_begin(config, trainer), trainer, peers)


def measure_together(given: str | None, trainer: pl.Trainer, peers: Peers | None) -> str | None:
    """The checkpoint that all processes of `validate`, `test` or `predict` load.

    Args:
        given: `--ckpt_path`.
        trainer: of the run.
        peers: the other processes, if any.

    Raises:
        UserError: as `what_to_measure`; or this process sees another disk than the first one.
    """
    return _together(given, lambda: what_to_measure(given, trainer), trainer, peers)


def _together(
    given: str | None, choose: Callable[[], str | None], trainer: pl.Trainer, peers: Peers | None
) -> str | None:
    if peers is None:
        return choose()

    def choose_and_date() -> tuple[str | None, Any]:
        path = choose()
        return path, path and said_time(Path(path))

    path, when = peers.decide("checkpoint", choose_and_date)
    if peers.rank and given is not None:
        _check_same_disk(given, path, when, trainer)
    return None if path is None else str(path)


def _check_same_disk(given: str, path: str | None, when: float | None, trainer: pl.Trainer) -> None:
    """Refuse a checkpoint that the first process has chosen and this one does not see, and one that only it sees."""
    here = f"rank {trainer.global_rank} on {socket.gethostname()}"
    if path is not None and not shows(lambda: Path(path).exists() and said_time(Path(path)) == when):
        found = "another one of that name" if Path(path).exists() else "none"
        raise UserError(
            f"--ckpt_path {given}: rank 0 goes on from '{path}', and {here} finds {found} there; "
            "use a --trainer.default_root_dir that all nodes share"
        )
    if path is None and (own := checkpoints_in(_folders(trainer))):
        raise UserError(
            f"--ckpt_path {given}: rank 0 finds no checkpoint, and {here} finds '{own[0]}'; "
            "use a --trainer.default_root_dir that all nodes share, or move it away"
        )


def shows(condition: Callable[[], bool]) -> bool:
    """Whether a file is as another process of the run has found it; a network disk may show it late.

    Args:
        condition: asked again for some seconds.
    """
    deadline = time.monotonic() + _LATE
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds


def what_to_measure(given: str | None, trainer: pl.Trainer) -> str | None:
    """The checkpoint that `validate`, `test` or `predict` load; None for the model as its folder has it.

    Args:
        given: `--ckpt_path`.
        trainer: of the run.

    Raises:
        UserError: there is none.
    """
    return _newest(given, trainer, to_train=False) if given == LAST else given


def _newest(word: str, trainer: pl.Trainer, to_train: bool) -> str | None:
    """The newest checkpoint of a run that is whole; None if there is none at all, which `auto` takes for a start."""
    folders = _folders(trainer)
    if (path := newest_whole(folders, to_train)) is not None:
        return str(path)
    if broken := checkpoints_in(folders):
        raise UserError(
            f"--ckpt_path {word}: no checkpoint in '{broken[0].parent}' is whole; start anew with --overwrite true, or "
            "choose another --trainer.default_root_dir"
        )
    if word == LAST:
        raise UserError(f"--ckpt_path last: there is no checkpoint in '{folders[0]}'; leave it out to start anew")
    return None


def _folders(trainer: pl.Trainer) -> list[Path]:
    """Where checkpoints of a run may be: a `ModelCheckpoint` that the trainer adds by itself says so too late."""
    named, usual = checkpoint_folders(trainer), Path(trainer.default_root_dir) / "checkpoints"
    return named if usual.resolve() in [folder.resolve() for folder in named] else [*named, usual]


def _refuse_earlier_run(trainer: pl.Trainer) -> None:
    root = Path(trainer.default_root_dir)
    if checkpoints_in(_folders(trainer)) or (root / "export").exists() or (root / MARK).exists():
        raise UserError(
            f"'{root}' holds an earlier run: resume it with --ckpt_path last, choose another "
            "--trainer.default_root_dir, or start anew in it with --overwrite true"
        )
