"""A tiny language model trained through `GradientAccumulation`, for one process or several.

`fit` runs one configuration and tells what came out as JSON values. Imported in the test process (one process) and in
the processes that `helpers.distributed` starts.
"""

import logging
import os
import pickle
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from rlhf_lightning.errors import NonFiniteError, UserError
from rlhf_lightning.runs.checkpoint_files import checksum, files_of, read_manifest, write_manifest
from rlhf_lightning.training import (
    DeepSpeedStrategy,
    FSDP2Strategy,
    GradientAccumulation,
    checkpoint_folders,
    consolidated_state_dict,
    forget_gradient,
    sum_over_ranks,
    synced,
    world_size,
)
from rlhf_lightning.training.checkpoint_folders import check_together
from rlhf_lightning.training.dcp_folders import stored_tensors
from rlhf_lightning.training.master_weights import with_master_weights

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
disable_progress_bar()

CONFIG = LlamaConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ROWS, LENGTH = 8, 10


class Batches(Dataset):
    """Three batches of eight rows with 2 to 10 tokens each; every process reads the same."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, CONFIG.vocab_size, (ROWS, LENGTH), generator=generator)
        lengths = torch.randint(2, LENGTH + 1, (ROWS, 1), generator=generator)
        return ids, torch.arange(LENGTH) < lengths


class TinyModule(pl.LightningModule):
    """Next-token prediction; `micro_sizes[batch_idx]` rows of this rank go through at once.

    Args:
        folder: the model is loaded from here in `configure_model`.
        micro_sizes: rows per micro-batch, one number per batch.
        gradient_clip_val: bound of the gradient norm, or None.
        adam: AdamW, otherwise SGD.
        passes: optimizer steps on each batch.
        poison: spoil the `loss` or the `gradient` of the last rank in the second batch.
    """

    def __init__(
        self,
        folder: str,
        micro_sizes: list[int],
        gradient_clip_val: float | None = None,
        adam: bool = False,
        passes: int = 1,
        poison: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.micro_sizes, self.gradient_clip_val, self.adam = micro_sizes, gradient_clip_val, adam
        self.passes, self.poison, self.folder = passes, poison, folder
        self.model: nn.Module | None = None
        self.seen: dict[str, Any] = {"norms": [], "losses": [], "rates": [], "reductions": 0, "error": ""}

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = AutoModelForCausalLM.from_pretrained(self.folder).train()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def configure_optimizers(self) -> dict[str, Any]:
        weights = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-2) if self.adam else torch.optim.SGD(weights, lr=0.5)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": decay}

    def loss_sum(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * mask[:, 1:]).sum()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for _ in range(self.passes):
            self.train_on(batch, batch_idx)

    def train_on(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        ids, mask = (field[self.global_rank :: world_size(self)] for field in batch)
        num_tokens = sum_over_ranks(self, mask[:, 1:].sum())
        size = self.micro_sizes[batch_idx]
        pieces = list(zip(ids.split(size), mask.split(size), strict=True))
        accumulation = GradientAccumulation(self, len(pieces))
        for piece in pieces:
            loss = self.loss_sum(*piece) / num_tokens
            if batch_idx == 1 and self.global_rank == world_size(self) - 1:
                loss = loss + self.poisoned(loss)
            accumulation.backward(loss)
        norm = accumulation.step(context=f"rows of rank {self.global_rank}")
        self.seen["norms"].append(norm.item())
        self.seen["losses"].append(accumulation.loss.item())
        self.seen["rates"].append(self.optimizers().param_groups[0]["lr"])

    def poisoned(self, loss: Tensor) -> Tensor | float:
        if self.poison == "loss":
            return loss * float("nan")
        if self.poison == "gradient":
            return ((loss - loss.detach()) * 0.0).abs().sqrt()  # 0, with an infinite slope
        return 0.0

    def on_train_start(self) -> None:
        self.seen["sum"] = sum_over_ranks(self, torch.tensor([[self.global_rank + 1, 10]])).tolist()
        self.seen["synced"] = synced(self)
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.register_comm_hook(self, _count_reductions)

    def keep_state(self) -> None:
        state = consolidated_state_dict(self, self.model)
        if state is None:
            return
        self.seen["state"] = {name: tensor.double().tolist() for name, tensor in state.items()}
        self.seen["tied"] = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


class ValidatedModule(TinyModule):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen["losses"].append((self.loss_sum(*batch) / batch[1][:, 1:].sum()).item())


class ForgetfulModule(TinyModule):
    """Several backwards and one step without `GradientAccumulation`."""

    def train_on(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        ids, mask = (field[self.global_rank :: world_size(self)] for field in batch)
        num_tokens = sum_over_ranks(self, mask[:, 1:].sum())
        for rows in range(0, len(ids), self.micro_sizes[batch_idx]):
            piece = slice(rows, rows + self.micro_sizes[batch_idx])
            self.manual_backward(self.loss_sum(ids[piece], mask[piece]) / num_tokens * world_size(self))
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()


class SelfClippingModule(ForgetfulModule):
    """Clips with Lightning's own method, to nearly nothing."""

    def manual_backward(self, loss: Tensor) -> None:
        super().manual_backward(loss)
        self.clip_gradients(self.optimizers(), gradient_clip_val=1e-9)


class SkippingModule(TinyModule):
    """Leaves out a step whose gradient is not finite."""

    def train_on(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        try:
            super().train_on(batch, batch_idx)
        except NonFiniteError:
            forget_gradient(self)


class MasteredModule(TinyModule):
    """Trains float32 copies of weights that are held in lower precision."""

    def configure_optimizers(self) -> dict[str, Any]:
        made = super().configure_optimizers()
        optimizer = with_master_weights(made["optimizer"], self.trainer)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": decay}


class UnannouncedModule(TinyModule):
    """Hides from transformers that ZeRO-3 runs."""

    def configure_model(self) -> None:
        self.trainer.strategy._hf_config = None
        super().configure_model()


class TwoOptimizersModule(TinyModule):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.model.parameters(), lr=rate) for rate in (0.1, 0.2)]


class MiscountingModule(TinyModule):
    """Announces `micro_sizes[0]` micro-batches and passes in `micro_sizes[1]`."""

    def train_on(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        accumulation = GradientAccumulation(self, self.micro_sizes[0])
        for _ in range(self.micro_sizes[1]):
            accumulation.backward(self.loss_sum(*batch))
        accumulation.step()


class _KeepState(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: TinyModule) -> None:
        pl_module.keep_state()

    def on_exception(self, trainer: pl.Trainer, pl_module: TinyModule, exception: BaseException) -> None:
        if isinstance(exception, NonFiniteError):
            pl_module.keep_state()


def _count_reductions(module: TinyModule, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    module.seen["reductions"] += 1
    return allreduce_hook(None, bucket)


def save_model(folder: Path, layers: int = CONFIG.num_hidden_layers) -> str:
    """Write the tiny model all runs start from."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": layers})).save_pretrained(folder)
    return str(folder)


def strategy(name: str) -> Any:
    """`zero0` to `zero3`, `-offload` for CPU offload of all the stage splits; `fsdp2`, also `-offload`, `-each` or
    `-last` for when gradients are reduced; or a name Lightning knows."""
    if name.startswith("fsdp2"):
        when: Any = name.partition("-")[2] if name.endswith(("-each", "-last")) else "auto"
        return FSDP2Strategy(cpu_offload=name.endswith("-offload"), reduce_gradients=when)
    if not name.startswith("zero"):
        return name
    stage, offload = int(name[4]), name.endswith("offload")
    return DeepSpeedStrategy(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)


def trainer(name: str = "auto", **kwargs: Any) -> pl.Trainer:
    """A silent CPU trainer on two processes, or one for `auto`."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "strategy": strategy(name),
        "devices": 1 if name == "auto" else 2,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "callbacks": [_KeepState()],
    }
    return pl.Trainer(**options | kwargs)


def loader() -> DataLoader:
    return DataLoader(Batches(), batch_size=None)


def fit(
    name: str = "auto",
    module_class: str = "TinyModule",
    trainer_options: dict[str, Any] | None = None,
    checkpoints: str | None = None,
    resume: str | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train on the three batches per epoch; what came out, as JSON values.

    Args:
        name: the strategy, see `strategy`.
        module_class: a module of this file.
        trainer_options: arguments of the Trainer.
        checkpoints: write a checkpoint per epoch into this folder.
        resume: checkpoint to resume from.
        **kwargs: arguments of the module.
    """
    module = globals()[module_class](**kwargs)
    options = dict(trainer_options or {})
    if checkpoints is not None:
        keep = ModelCheckpoint(checkpoints, "{epoch}", save_top_k=-1, every_n_epochs=1)
        options |= {"enable_checkpointing": True, "callbacks": [_KeepState(), keep]}
    run = trainer(name, **options)
    try:
        run.fit(module, loader(), ckpt_path=resume)
    except Exception as error:
        module.seen["error"] = f"{type(error).__name__}: {error}"
    return module.seen | {"global_step": run.global_step}


class Runs:
    """Unpickling it makes a file beside the checkpoint."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def spoil(checkpoint: str, file: str, how: str, folder: str) -> None:
    """Put something else into one file of a checkpoint; the first process does.

    Args:
        checkpoint: the folder.
        file: inside it.
        how: `code` for a pickle that runs some, with a manifest that says so, or `plain code` for one as plain pickle
            writes it; `damage` for another byte; `missing`.
        folder: of the model, not used.
    """
    if os.environ["RANK"] != "0":
        return
    path, root = Path(checkpoint) / file, Path(checkpoint)
    kept = root.with_name(root.name + " as it was")
    if kept.exists():
        shutil.rmtree(root)
    shutil.copytree(kept if kept.exists() else root, root if kept.exists() else kept)
    if how in ("code", "plain code"):
        content = {"module": Runs(f"{checkpoint} ran")}
        torch.save(content, path) if how == "code" else path.write_bytes(pickle.dumps(content))
        settings = read_manifest(root)["settings"]
        write_manifest(root, {name: checksum(root / name) for name in files_of(root)}, settings)
    elif how == "damage":
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    else:
        path.unlink()


def check(checkpoint: str, settings: dict[str, Any] | None, folder: str, in_parts: bool = False) -> str:
    """What `check_together` says of a checkpoint of a run that this process has just made; `in_parts` for FSDP2's."""
    dist.barrier()  # the first process may still be writing
    try:
        if in_parts:
            check_together(Path(checkpoint), settings, nullcontext, stored_tensors)
        else:
            check_together(Path(checkpoint), settings)
    except UserError as error:
        return str(error)
    return ""


def apart(root: str, folder: str) -> tuple[str, list[str]]:
    """What is said, and what is left, where each process writes its part of a checkpoint to a disk of its own."""
    own, before = Path(root) / os.environ["RANK"], Path.cwd()
    partial = Path("x.ckpt.partial")
    (own / partial).mkdir(parents=True)
    (own / partial / f"{os.environ['RANK']}.pt").write_text("its part")
    os.chdir(own)
    try:
        with patch.object(checkpoint_folders, "_LATE", 0.2):
            checkpoint_folders.finish_together(partial, Path("x.ckpt"), {})
    except UserError as error:
        return str(error), [path.name for path in own.iterdir()]
    finally:
        os.chdir(before)
    return "", [path.name for path in own.iterdir()]


def validate(name: str, **kwargs: Any) -> dict[str, Any]:
    """Losses of the three batches before any training."""
    module = ValidatedModule(**kwargs)
    trainer(name).validate(module, loader(), verbose=False)
    return module.seen


def run_all(runs: list[dict[str, Any]]) -> list[Any]:
    """One run after the other in the same process."""
    results = []
    for run in runs:
        tasks = {"fit": fit, "validate": validate, "spoil": spoil, "check": check, "apart": apart}
        task = tasks[run.get("task", "fit")]
        results.append(task(**{key: value for key, value in run.items() if key != "task"}))
    return results
