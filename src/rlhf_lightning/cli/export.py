"""`rlhf export`: a checkpoint of a run as a Hugging Face folder.

The signature of `export` is the config; its docstring is the help.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers.utils.logging import disable_progress_bar

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.callbacks.export_folder import check_place, finish_replacing, real_place
from rlhf_lightning.cli.checkpoint_export import Part, export_checkpoint, read_checkpoint
from rlhf_lightning.cli.functions import run_function
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.saving import MAX_SHARD_SIZE, check_shard_size
from rlhf_lightning.runs.checkpoint_files import MANIFEST, checkpoints_in, newest_whole
from rlhf_lightning.runs.lock import locked
from rlhf_lightning.runs.writable import check_folder


def export(
    checkpoint: str,
    out: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    base: str | None = None,
    part: Part = "model",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the model in a checkpoint as a Hugging Face folder, as the end of its run would have done.

    Args:
        checkpoint: a .ckpt file, the folder that a strategy wrote in its place, or the folder of a run: then the newest
            that is whole.
        out: the folder to write.
        dtype: of the weights; auto for the one they were trained in.
        max_shard_size: of a file of weights, in bytes or such as 5GB; a larger model gets several and an index.
        base: where the model is now that training started from, if it was moved; with `--part value` the one that the
            value model began as.
        part: model for the one that the stage trains; value for PPO's value model, as a reward model.
        overwrite: replace an export that lies there.
        trust_remote_code: run Python code that comes with the model that training started from.

    Raises:
        UserError: no whole checkpoint of this package, a base that is gone or another, or something in the way.
    """
    check_arguments(export, locals())
    check_shard_size(max_shard_size, "--max_shard_size")
    if out is None:
        raise UserError("nothing says where to write; pass --out")
    folder, path = Path(out).expanduser(), _checkpoint_at(Path(checkpoint).expanduser())
    disable_progress_bar()  # files are on the disk until they are written
    place = real_place(folder)
    with locked(place.parent, "--out", place.name):
        _check_out(folder, path, overwrite)
        export_checkpoint(
            read_checkpoint(path, base, part),
            folder,
            None if dtype == "auto" else getattr(torch, dtype),
            max_shard_size,
            trust_remote_code,
        )
    print(f"exported '{path}' to '{folder}'")


def _checkpoint_at(path: Path) -> Path:
    """The checkpoint itself, or the newest of a run."""
    folder = path / "checkpoints"
    if not folder.is_dir() or (path / MANIFEST).exists():
        return path
    newest = newest_whole([folder])
    if newest is None:
        what = "no checkpoint in it is whole" if checkpoints_in([folder]) else "there is no checkpoint in it"
        raise UserError(f"'{folder}' cannot be exported from: {what}")
    return newest


def _check_out(folder: Path, checkpoint: Path, overwrite: bool) -> None:
    """Refuse what would be lost."""
    place = real_place(folder)
    if place in [checkpoint.resolve(), *checkpoint.resolve().parents]:
        raise UserError(f"--out {folder}: the checkpoint lies in it; choose another folder")
    check_folder("--out: it lies in", place.parent)
    finish_replacing(folder)
    check_place(folder)
    if place.is_dir() and any(place.iterdir()) and not overwrite:
        raise UserError(f"--out {folder}: an export lies there; pass --overwrite true to replace it, or choose another")


def main(options: Sequence[str]) -> None:
    """Entry point of `rlhf export`.

    Args:
        options: the words after `export`, recipes resolved.

    Raises:
        UserError: something the user can fix.
    """
    run_function(export, "export", options, "CHECKPOINT --out FOLDER [options]")
