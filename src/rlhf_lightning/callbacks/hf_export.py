"""Writes the Hugging Face folder that the next stage, or anybody's tools, start from."""

from __future__ import annotations

import shutil
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning.algorithms.lineage import trained_on
from rlhf_lightning.algorithms.reward import RewardModule
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.arguments import check_arguments, constructor_arguments
from rlhf_lightning.callbacks.export_folder import check_place, finish_replacing, real_place, replace_folder
from rlhf_lightning.callbacks.model_card import Told
from rlhf_lightning.callbacks.model_folder import write_around
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_folders import is_adapter
from rlhf_lightning.models.heads import exported_heads, write_heads
from rlhf_lightning.models.rendering import RENDERING, rendering_of
from rlhf_lightning.models.saving import MAX_SHARD_SIZE, check_shard_size, whole_weights
from rlhf_lightning.models.written_folders import AdapterFolder, ModelFolder
from rlhf_lightning.runs.lineage import is_ours, new_record
from rlhf_lightning.runs.signals import Stopped
from rlhf_lightning.runs.writable import check_folder


class HFExport(Callback):
    """Exports the trained model at the end of `fit`.

    The folder holds weights, config, tokenizer with its chat template, generation config, and a model card that says
    from what and with which settings it was made. It is written beside its place and then renamed, so a half-written
    one is never found; and a folder of somebody else is never replaced: an export is known by its `lineage.json`. Where
    a link leads to its place, the link stays.

    After LoRA it is a plain model, too, the adapters added to the weights; or, with the module's `finetune.export:
    adapter`, a PEFT folder that loads on the model that training started from.

    Weights are written one after the other: no process holds the model a second time, whatever the strategy.

    Args:
        dirpath: where to write; by default `export` in the trainer's `default_root_dir`.
        with_checkpoints: also write a folder beside every checkpoint that is kept, `<checkpoint>-hf`; it goes when its
            checkpoint goes.
        dtype: type of the saved weights; `auto` for the type they were trained in.
        max_shard_size: of a file of weights, in bytes or such as `5GB`; a larger model gets several and an index.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        with_checkpoints: bool = False,
        dtype: str = "auto",
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        check_arguments(HFExport, locals())
        check_shard_size(max_shard_size, "HFExport: max_shard_size")
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"HFExport: dtype '{dtype}' is unknown; use auto, float32, bfloat16 or float16")
        self.dirpath = dirpath
        self.with_checkpoints = with_checkpoints
        self.dtype = dtype
        self.max_shard_size = max_shard_size
        self._checkpoint_written = False
        self._stamps: dict[str, int] = {}

    def target(self, trainer: pl.Trainer) -> Path:
        """The folder that `fit` ends with."""
        return Path(self.dirpath).expanduser() if self.dirpath else Path(trainer.default_root_dir) / "export"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse now, not after hours of training, to replace a folder of somebody else or to stack adapters."""
        if _exports_adapter(pl_module) and is_adapter(base := _base(pl_module)):
            raise UserError(
                f"finetune.export adapter: '{base}' is an adapter itself, and one cannot stand on another; set "
                "finetune.export to merged"
            )
        target = self.target(trainer)
        if trainer.is_global_zero:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                check_folder("the export would go to", real_place(target).parent)
            finish_replacing(target)
        trainer.strategy.barrier()
        check_place(target)
        self._stamps = trainer.strategy.broadcast(_checkpoint_stamps(trainer))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export the final weights; a `fast_dev_run` leaves nothing behind."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._export_with_checkpoints(trainer, pl_module)
        self.export(trainer, pl_module, self.target(trainer))
        rank_zero_info(f"exported to '{self.target(trainer)}'")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Note that the next hook has a checkpoint to go with."""
        self._checkpoint_written = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Export beside a checkpoint while the weights are still those it holds."""
        self._export_with_checkpoints(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same where a run that is asked to stop has just saved."""
        if isinstance(exception, Stopped):
            self._export_with_checkpoints(trainer, pl_module)

    def _export_with_checkpoints(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not (self.with_checkpoints and self._checkpoint_written):
            return
        self._checkpoint_written = False
        stamps = trainer.strategy.broadcast(_checkpoint_stamps(trainer))
        for checkpoint, stamp in stamps.items():
            if self._stamps.get(checkpoint) != stamp:
                self.export(trainer, pl_module, _beside(checkpoint))
        if trainer.is_global_zero:
            # Only what this run has seen beside a checkpoint: another folder of that name may be somebody's copy.
            for gone in self._stamps.keys() - stamps.keys():
                if is_ours(folder := _beside(gone)):
                    shutil.rmtree(folder)
        self._stamps = stamps

    def export(self, trainer: pl.Trainer, pl_module: Any, folder: Path) -> None:
        """Write one folder. Every process must call it.

        Args:
            trainer: the running trainer.
            pl_module: a module with `export_model` and `tokenizer`.
            folder: replaced if it is an export.

        Raises:
            UserError: something else lies there.
        """
        _record_rendering(trainer, pl_module)
        model, dtype = pl_module.export_model, None if self.dtype == "auto" else getattr(torch, self.dtype)
        written: ModelFolder | AdapterFolder
        if _exports_adapter(pl_module):
            written = AdapterFolder(model, _base(pl_module), dtype)
        else:
            written = ModelFolder(model, dtype, self.max_shard_size)
        weights = whole_weights(model, written.groups)
        heads = exported_heads(pl_module.scalar.ensemble) if isinstance(pl_module, RewardModule) else None

        def write(new: Path) -> None:
            written.write(new, weights, pl_module.tokenizer)
            if heads is not None:
                write_heads(new, heads, dtype)
            write_around(new, pl_module.tokenizer, *_around(trainer, pl_module))

        try:
            if trainer.is_global_zero:
                replace_folder(folder, write)
        finally:
            for _ in weights:  # the other processes take part in each, whatever becomes of the folder
                pass


def _around(trainer: pl.Trainer, pl_module: Any) -> tuple[Told, dict[str, Any], np.ndarray]:
    """What the folder says of itself: its card, where it comes from, and by which prompts.

    Of a foreign module only that it is an export.
    """
    is_stage = isinstance(pl_module, Stage)
    record = pl_module.lineage if is_stage else new_record(type(pl_module).__name__, {})
    prompts = trained_on(pl_module) if is_stage else np.zeros(0, np.uint64)
    return model_card(trainer, pl_module), record, prompts


def _record_rendering(trainer: pl.Trainer, pl_module: Any) -> None:
    """Let the folder say how its dialogues were written: the data's chat template, and the format."""
    chat = getattr(getattr(trainer, "datamodule", None), "chat", None)
    if isinstance(chat, ChatEncoder):
        pl_module.tokenizer.chat_template = chat.tokenizer.chat_template
    # Null, too, is a record: what the model that training started from was trained on counts no more.
    setattr(pl_module.export_model.config, RENDERING, rendering_of(chat) if isinstance(chat, ChatEncoder) else None)


def _exports_adapter(pl_module: Any) -> bool:
    finetune = getattr(pl_module, "finetune", None)
    return finetune is not None and finetune.export == "adapter"


def _base(pl_module: Any) -> str:
    """What training started from."""
    return str(Path(pl_module.model_name_or_path).expanduser())


def _beside(checkpoint: str) -> Path:
    """The folder that goes with a checkpoint."""
    return Path(checkpoint.removesuffix(".ckpt") + "-hf")


def _checkpoint_stamps(trainer: pl.Trainer) -> dict[str, int]:
    """When each checkpoint that is there, a file or DeepSpeed's folder, was written."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    kept = sorted({path for c in callbacks if c.dirpath for path in Path(c.dirpath).glob("*.ckpt")})
    return {str(path): max(part.stat().st_mtime_ns for part in (path, *path.rglob("*"))) for path in kept}


def model_card(trainer: pl.Trainer, pl_module: Any) -> Told:
    """What the model card of a run's export says.

    Args:
        trainer: the running trainer.
        pl_module: the module whose model is saved.
    """
    settings: dict[str, Any] = {"module": _settings(pl_module)}
    if (datamodule := getattr(trainer, "datamodule", None)) is not None:
        settings["data"] = _settings(datamodule)
    settings["trainer"] = {"precision": str(trainer.precision), "world_size": trainer.world_size}
    return Told(
        type(pl_module).__name__,
        str(pl_module.model_name_or_path),
        trainer.global_step,
        settings,
        dict(trainer.callback_metrics),
        _exports_adapter(pl_module),
        isinstance(pl_module, RewardModule) and bool(pl_module.tokenizer.chat_template),
    )


def _settings(configured: Any) -> dict[str, Any]:
    """The constructor's arguments, as far as the object keeps them, under their names."""
    settings = {}
    for name in constructor_arguments(type(configured)):
        owner = configured if hasattr(configured, name) else getattr(configured, "limits", None)
        value = getattr(owner, name, None)
        if name == "optimizer":
            settings[name] = _optimizer_settings(value)
        elif name != "tokenizer" and value is not None:
            settings[name] = _plain(value)
    return settings


def _optimizer_settings(make_optimizer: Any) -> dict[str, Any]:
    """What an optimizer is made with, whether a lambda or the command line makes it."""
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    plain = {name: _plain(value) for name, value in optimizer.defaults.items() if value is not None}
    return {"class": type(optimizer).__name__, **plain}


def _plain(value: Any) -> Any:
    """A setting as YAML can write it; of any other object what it is called, as `Table a.jsonl`."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, list) and len(value) > 20:
        return f"{len(value)} rows given in Python"
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if value is None or kind is not None:
        return value if kind is None else kind(value)
    called, name = getattr(value, "__name__", type(value).__name__), getattr(value, "name", None)
    return f"{called} {name}" if isinstance(name, str) else called
