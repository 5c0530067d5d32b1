"""What the modules of all stages do alike, as functions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.arguments import AT_LEAST_1
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.models.tokenizer import check_same_words, load_tokenizer
from rlhf_lightning.training import sum_over_ranks, world_size
from rlhf_lightning.training.master_weights import with_master_weights
from rlhf_lightning.training.optim import schedule_learning_rate

PieceT = TypeVar("PieceT")

_ROLLOUT = ("rollout_batch_size", "generation_batch_size", "ppo_epochs")
SIZES = dict.fromkeys((*_ROLLOUT, "minibatch_size", "micro_batch_size", "max_tokens_per_batch"), AT_LEAST_1)
"""What the modules' counts may be, for `check_arguments`."""


def _datamodule(module: pl.LightningModule) -> Any:
    """The data module that a stage is run with; None without one, or without a trainer."""
    try:
        return getattr(module.trainer, "datamodule", None)
    except RuntimeError:  # not attached
        return None


def stage_tokenizer(module: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a stage's model, with the chat template by which the data module writes dialogues.

    What ends a turn in that template is what generation stops at and what the export's generation config lists.

    Args:
        module: has `model_name_or_path` and `trust_remote_code`, and may be attached to a trainer.

    Raises:
        UserError: there is no tokenizer at that place, or the data module's gives its ids to other words.
    """
    tokenizer = load_tokenizer(module.model_name_or_path, module.trust_remote_code)
    theirs = getattr(_datamodule(module), "tokenizer", None)
    if isinstance(theirs, PreTrainedTokenizerBase):
        check_same_words(tokenizer, theirs)
        if theirs.chat_template is not None:
            tokenizer.chat_template = theirs.chat_template
    return tokenizer


def check_batch_sizes(**sizes: int | None) -> None:
    """Refuse a size that does not divide the one named before it.

    Args:
        **sizes: from the largest to the smallest; None is passed over.

    Raises:
        UserError: names both sizes.

    Example:
        >>> check_batch_sizes(minibatch_size=6, micro_batch_size=4)
        Traceback (most recent call last):
        rlhf_lightning.errors.UserError: minibatch_size (6) must be a multiple of micro_batch_size (4)
    """
    given = [(name, size) for name, size in sizes.items() if size is not None]
    for (name, size), (smaller_name, smaller) in pairwise(given):
        if size % smaller:
            raise UserError(f"{name} ({size}) must be a multiple of {smaller_name} ({smaller})")


def check_token_budget(micro_batch_size: int | None, max_tokens_per_batch: int | None) -> None:
    """Refuse two limits at once.

    Args:
        micro_batch_size: rows per forward and backward pass.
        max_tokens_per_batch: tokens per forward and backward pass.

    Raises:
        UserError: both are given.
    """
    if micro_batch_size is not None and max_tokens_per_batch is not None:
        raise UserError("micro_batch_size and max_tokens_per_batch both limit a forward pass: give one of them")


def equally_many(module: pl.LightningModule, cut: Callable[[int], list[PieceT]]) -> list[PieceT]:
    """Cut a batch into as many pieces on this process as on every other; each must go through the model as often.

    Args:
        module: attached to a trainer; every process must call this.
        cut: gives the pieces of this process, at least as many as it is asked for.

    Example:
        In a `training_step`::

            pieces = equally_many(self, lambda n: micro_batches(batch, max_tokens=4096, min_pieces=n))
    """
    pieces = cut(1)
    if world_size(module) == 1:
        return pieces
    most = module.all_gather(torch.tensor(len(pieces), device=module.device)).max()  # type: ignore[union-attr]
    return pieces if len(pieces) == int(most) else cut(int(most))


def name_rows(row_ids: Tensor) -> str:
    """How error messages name the examples of a batch.

    Args:
        row_ids: any shape; negative numbers stand for no example.

    Example:
        >>> name_rows(torch.tensor([3, 7]))
        'rows 3, 7'
    """
    return "rows " + ", ".join(str(row) for row in row_ids[row_ids >= 0].tolist())


def count_tokens(module: pl.LightningModule, masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Real tokens of a step on all processes, and the share of padding in what the model was shown.

    Args:
        module: attached to a trainer.
        masks: of everything that went through the model on this process; True for real tokens, any shapes, bool.

    Returns:
        Two scalars, the same on every process.
    """
    real = torch.stack([mask.sum() for mask in masks]).sum()
    shown = torch.full_like(real, sum(mask.numel() for mask in masks))
    num_tokens, num_shown = sum_over_ranks(module, torch.stack([real, shown]))
    # As floats: the quotient of integers has torch's default dtype, which bf16-true sets to bfloat16.
    return num_tokens.float(), 1 - num_tokens.float() / num_shown


def log_metrics(module: pl.LightningModule, metrics: dict[str, Any], shown: str, batch_size: int) -> None:
    """Log numbers that are the same on every rank already.

    Args:
        module: the stage, inside a training step.
        metrics: name to number or scalar tensor.
        shown: the one that the progress bar shows too.
        batch_size: examples the numbers speak of.
    """
    for name, value in metrics.items():
        module.log(name, value, prog_bar=name == shown, batch_size=batch_size)


def configure_optimizer(module: Any, optimizer: Optimizer, steps_per_batch: int = 1) -> dict[str, Any]:
    """Optimizer and schedule as Lightning wants them, the schedule counted in optimizer steps.

    Weights of lower precision are trained through float32 copies.

    Args:
        module: has `lr_schedule` and `warmup_steps` and is attached to a trainer.
        optimizer: built already.
        steps_per_batch: optimizer steps made from one batch of the loader.
    """
    trainer = module.trainer
    batches = trainer.estimated_stepping_batches  # also sets up the loader
    if trainer.max_steps > 0:  # in optimizer steps, whereas the estimate mixes them with batches
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else float("inf")
        total = min(float(trainer.max_steps), trainer.num_training_batches * epochs * steps_per_batch)
    else:
        # Lightning says -1 for a stream without a length, which has no end either.
        total = float(batches) * steps_per_batch if batches >= 0 else float("inf")
    optimizer = with_master_weights(optimizer, trainer)
    scheduler = schedule_learning_rate(optimizer, module.lr_schedule, module.warmup_steps, total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def response_rows(prompts: PromptBatch, generation: Generation, texts: list[str]) -> list[dict[str, Any]]:
    """Answers as `predict` returns them: `row`, `prompt`, `response`, `ended` and `tokens`.

    `ended` is False where the response was cut at the limit; `tokens` is its length, the EOS included.

    Args:
        prompts: the prompts.
        generation: their responses.
        texts: the responses as text.
    """
    names = ("row", "prompt", "response", "ended", "tokens")
    lengths = generation.response_mask.sum(dim=1).tolist()
    stripped = [text.strip() for text in texts]
    columns = (prompts.row_ids.tolist(), prompts.prompts, stripped, generation.ended.tolist(), lengths)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def policy_chat(module: pl.LightningModule, tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """What writes dialogues as the policy reads them: the data module's, or the default for other loaders.

    Args:
        module: the stage, attached to a trainer or not.
        tokenizer: the policy's.
    """
    chat = getattr(_datamodule(module), "chat", None)
    return chat if isinstance(chat, ChatEncoder) else ChatEncoder(tokenizer)


def run_seed(module: Any) -> int:
    """The seed of the run: that of the checkpoint it was resumed from, else torch's (`seed_everything`)."""
    state = getattr(module, "_run_state", None)
    return state["seed"] if state else torch.initial_seed()


def save_run_state(module: pl.LightningModule, checkpoint: dict[str, Any], **state: Any) -> None:
    """Write what a stage must remember, besides weights, under one key of the checkpoint.

    Args:
        module: the stage.
        checkpoint: Lightning's.
        **state: plain numbers, strings, lists and dicts, so that the checkpoint loads without unpickling code.
    """
    checkpoint["rlhf_lightning"] = {"seed": run_seed(module), **state}


def drop_frozen_weights(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Take frozen weights out of a checkpoint: they are loaded from their own folders.

    Args:
        module: the stage.
        checkpoint: Lightning's; DeepSpeed keeps weights elsewhere and leaves them out itself.
    """
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    weights = checkpoint.get("state_dict", {})
    for name in frozen & weights.keys():
        del weights[name]


def load_run_state(module: pl.LightningModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What `save_run_state` wrote, once the checkpoint's weights are known to fit.

    Args:
        module: the stage, its models loaded.
        checkpoint: Lightning's.

    Raises:
        UserError: the checkpoint is not of this package, or of another model or stage.
    """
    check_trained_weights(module, checkpoint)
    if "rlhf_lightning" not in checkpoint:
        raise UserError("the checkpoint was not made by this package; resume from one of its own")
    state: dict[str, Any] = checkpoint["rlhf_lightning"]
    return state


def check_trained_weights(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks trained weights; without strict loading they would silently stay as they are.

    Args:
        module: the stage, its models loaded.
        checkpoint: Lightning's.

    Raises:
        UserError: names a weight that is missing, unknown or of another shape.
    """
    weights = checkpoint.get("state_dict")
    if not weights:
        return
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    known = module.state_dict()
    reason = "it was made with another model or stage"
    if missing := sorted(trained - weights.keys()):
        raise UserError(f"the checkpoint has no weight '{missing[0]}': {reason}")
    if unknown := sorted(weights.keys() - known.keys()):
        raise UserError(f"the checkpoint's weight '{unknown[0]}' is unknown: {reason}")
    for name in sorted(trained):
        if weights[name].shape != known[name].shape:
            shapes = f"{list(weights[name].shape)}, not {list(known[name].shape)}"
            raise UserError(f"the checkpoint's weight '{name}' has the shape {shapes}: {reason}")
