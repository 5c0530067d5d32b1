"""What every algorithm shares: its arguments, its optimizer steps, its checkpoints, and what callbacks may ask of it.

One batch of the loader is one call of `training_step`, and a step of the optimizer happens in one place,
`Stage.optimise`: the gradient of the *sum* of all losses, over micro-batches and ranks, divided by what they sum over
(tokens, pairs), so that neither the number of micro-batches nor that of processes changes a result. That is why the
optimisation is manual: Lightning's `accumulate_grad_batches` averages the means of micro-batches.

A new algorithm has `load_models`, `export_model` and `training_step`; `docs/extending.md` shows one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.parsing import collect_init_args
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.algorithms.hyperparameters import PLAIN, as_config, from_config, optimizer_from_config
from rlhf_lightning.algorithms.lineage import check_parents, is_fitting, lineage_of
from rlhf_lightning.algorithms.log_keeper import keep_logs
from rlhf_lightning.algorithms.logged import LoggedModule
from rlhf_lightning.algorithms.trainer_checks import check_trainer, keep_checkpoints_whole, let_checkpoints_save
from rlhf_lightning.arguments import AT_LEAST_1, SHARE, check_arguments
from rlhf_lightning.errors import NonFiniteError, UserError
from rlhf_lightning.forward.casts import cast_once
from rlhf_lightning.forward.compiled_layers import compiled_layers
from rlhf_lightning.host import on_host
from rlhf_lightning.models.finetune import describe_trained
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.tokenizer import check_same_words, load_tokenizer
from rlhf_lightning.rng import forked_rng, generator, occurrences
from rlhf_lightning.training import GradientAccumulation, equally_many, rows_of_all_ranks, sum_over_ranks
from rlhf_lightning.training.master_weights import with_master_weights
from rlhf_lightning.training.optim import (
    ADAMW,
    Schedule,
    fuse,
    make_optimizer,
    parameter_groups,
    schedule_learning_rate,
)
from rlhf_lightning.training.token_budget import budget_of
from rlhf_lightning.warning_filters import filter_warnings

PieceT = TypeVar("PieceT")
Loss = tuple[Tensor, dict[str, Tensor]]
"""A loss summed over what counts (tokens, pairs), a scalar; and sums that are logged beside it, without gradient."""


class Step(NamedTuple):
    """What one step of the optimizer did; all scalars, the same on every rank.

    Attributes:
        loss: the loss that was differentiated.
        grad_norm: norm of its gradient before clipping.
        part_norms: the same of each trained part by itself, where there are several and the strategy lets it be known.
        means: what was logged beside the losses, divided as they were.
    """

    loss: Tensor
    grad_norm: Tensor
    part_norms: dict[str, Tensor]
    means: dict[str, Tensor]


class Stage(LoggedModule):
    """A module that loads a model, trains it with an optimizer that it steps itself, and hands it to the next stage.

    Args:
        model_name_or_path: Hugging Face folder or hub id of the model to start from.
        optimizer: the optimizer; weight decay reaches matrices only.
        lr_schedule: course of the learning rate after the warm-up, in optimizer steps.
        min_lr_factor: where `cosine` and `linear` end, as a share of the highest rate. 0.1 in Ouyang et al. 2022 and
            Touvron et al. 2023.
        warmup_steps: optimizer steps of linear warm-up; a number below 1 is a share of all steps.
        micro_batch_size: examples per forward and backward pass; None to count tokens. Splitting changes memory and
            time, not the gradient.
        max_tokens_per_batch: tokens per forward and backward pass, padding included; examples of similar length go
            together, few long ones or many short ones. An example above it goes alone. `auto` for what suits the device
            (512 on a CPU, 1,024 to 16,384 on a GPU by its memory and the models; twice as many on a CPU where an
            example is a pair); None for all of an optimizer step at once.
        gradient_clip_val: norm the gradient is clipped to; None for no clipping.
        finetune: which weights are trained.
        gradient_checkpointing: keep only each block's input for the backward pass and compute the rest again: less
            memory, a third more time, the same gradient.
        compile: compile the layers of the models once for all layers and batches, by `torch.compile`, when the first
            steps need them: meant for GPUs. Where it cannot be done, one line says why.
        trust_remote_code: allow the model folder to run Python code of its own.

    Attributes:
        tokenizer: of the model, with the chat template of the data; there once the models are loaded.
        optimizer_steps: of the whole run, infinite where it has no end; there once the optimizer is made.
        sequences_per_example: that a model reads.
    """

    tokenizer: PreTrainedTokenizerBase
    optimizer_steps: float = 0
    sequences_per_example = 1

    def __init__(
        self,
        model_name_or_path: str,
        *,
        optimizer: OptimizerCallable = ADAMW,
        lr_schedule: Schedule = "cosine",
        warmup_steps: float = 0.03,
        min_lr_factor: float = 0.0,
        micro_batch_size: int | None = None,
        max_tokens_per_batch: int | Literal["auto"] | None = "auto",
        gradient_clip_val: float | None = 1.0,
        finetune: FineTune = FineTune(),
        gradient_checkpointing: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        filter_warnings()
        _warn_of_other_lightning(type(self).__name__)
        finetune = from_config(FineTune, finetune)
        ranges = {"micro_batch_size": AT_LEAST_1, "max_tokens_per_batch": AT_LEAST_1, "min_lr_factor": SHARE}
        check_arguments(Stage, locals(), ranges)
        if micro_batch_size is not None and max_tokens_per_batch not in (None, "auto"):
            raise UserError("micro_batch_size and max_tokens_per_batch both limit a forward pass: give one of them")
        self._remember_arguments()
        self.automatic_optimization = False
        self.strict_loading = finetune.mode == "all"  # otherwise checkpoints lack what is frozen
        self.model_name_or_path = model_name_or_path
        self.optimizer = optimizer_from_config(optimizer)
        self.lr_schedule: Schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.min_lr_factor = min_lr_factor
        self.micro_batch_size = micro_batch_size
        self.max_tokens_per_batch: int | Literal["auto"] | None = max_tokens_per_batch
        self.gradient_clip_val = gradient_clip_val
        self.finetune = finetune
        self.gradient_checkpointing = gradient_checkpointing
        self.compiles_layers = compile  # `compile` is a method of every module
        self.trust_remote_code = trust_remote_code
        self._is_configured = False
        self._budgets: dict[torch.device, int] = {}

    def _remember_arguments(self) -> None:
        """Save the arguments of this class and of the subclass that is being made, as a config would hold them."""
        frame: Any = inspect.currentframe()
        arguments: dict[str, Any] = {}
        frames = collect_init_args(frame.f_back, [], classes=(Stage,))  # of the bases first
        # Somebody's subclass may fix what a base takes: given back to it, that would be one argument twice.
        for taken in frames if type(self).__module__.startswith("rlhf_lightning.") else frames[-1:]:
            arguments |= taken
        structured = {name: value for name, value in arguments.items() if not isinstance(value, PLAIN)}
        left_out = {name for taken in frames for name in taken} - arguments.keys()
        self.save_hyperparameters(ignore=[*structured, *left_out], frame=frame.f_back)
        self.save_hyperparameters(as_config(**structured), frame=frame.f_back)

    # What an algorithm says of itself.

    def load_models(self) -> None:
        """Load what `model_name_or_path` and the other arguments name; called once, `tokenizer` is there already."""
        raise NotImplementedError

    @property
    def export_model(self) -> PreTrainedModel:
        """The model that is trained, and that the next stage starts from."""
        raise NotImplementedError

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """What the optimizer moves, by name."""
        return {"model": self.export_model}

    @property
    def resting_parts(self) -> Sequence[str]:
        """Names of those among them that a step leaves alone, as if they were frozen."""
        return ()

    @property
    def part_clip_vals(self) -> dict[str, float | None]:
        """The norm that the gradient of each is clipped to by itself; empty to clip all together."""
        return {}

    @property
    def parents(self) -> dict[str, str]:
        """Folder or hub id of each model that the stage begins with, by its role."""
        return {"model": self.model_name_or_path}

    @property
    def updating_models(self) -> list[nn.Module]:
        """What runs in an update, whose weights are cast once for all micro-batches under autocast."""
        return [*self.trained_parts.values()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer."""
        return parameter_groups(self.export_model)

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps made from one batch of the loader."""
        return 1

    @property
    def token_budget(self) -> int | None:
        """Tokens per forward and backward pass at most; None where examples are counted, or all go at once."""
        if self.micro_batch_size is not None:
            return None
        if self.max_tokens_per_batch != "auto":
            return self.max_tokens_per_batch
        if self.device not in self._budgets:
            options = {"sequences": self.sequences_per_example, "checkpointing": self.gradient_checkpointing}
            self._budgets[self.device] = budget_of(self, **options)
        return self._budgets[self.device]

    # What it can use.

    @property
    def datamodule(self) -> Any:
        """The data module that the stage is run with; None without one, or without a trainer."""
        try:
            return getattr(self.trainer, "datamodule", None)
        except RuntimeError:  # not attached
            return None

    def random(self, *place: int | str, device: torch.device | str | None = None) -> torch.Generator:
        """Random numbers for one place in the run, the same on every rank.

        Args:
            *place: names the place, such as `"minibatches"` and the number of the iteration.
            device: where they are needed; the module's if None.
        """
        return generator(device or self.device, self.seed, *place)

    def random_by_row(
        self, row_ids: Tensor, *place: int | str, samples: int = 1, together: bool = False
    ) -> list[torch.Generator]:
        """Random numbers for each row of a batch, which do not depend on the rank or the batch that it is in.

        A row that stands in the batch several times has others each time.

        Args:
            row_ids: of this rank's rows, `[B]`, int64.
            *place: names the place in the run.
            samples: how many are needed of each row, next to one another.
            together: count how often a row stands in the batches of all ranks, every one of which must call this, with
                as many rows.
        """
        rows = on_host(row_ids)[0].tolist()
        everyone = on_host(rows_of_all_ranks(self, row_ids))[0].tolist() if together else rows
        share = slice(self.global_rank, None, self.trainer.world_size) if together else slice(None)
        counted = zip(rows, occurrences(everyone)[share], strict=True)
        return [self.random(*place, *row, sample) for row in counted for sample in range(samples)]

    def cut(self, cut: Callable[[int], list[PieceT]]) -> list[PieceT]:
        """Cut a batch into as many micro-batches on this process as on every other; all must call it.

        Args:
            cut: gives the pieces of this process, at least as many as it is asked for.

        Example:
            In a `training_step`::

                pieces = self.cut(lambda n: micro_batches(batch, self.micro_batch_size, None, min_pieces=n))
        """
        return equally_many(self, cut)

    def optimise(
        self,
        pieces: Sequence[PieceT],
        loss_of: Callable[[PieceT], Iterable[Loss]],
        total: Tensor,
        context: str = "",
        logged_total: Tensor | None = None,
    ) -> Step:
        """Take one optimizer step; the one place where weights change. Every rank must call it.

        Args:
            pieces: micro-batches of this rank, as many as on every other (see `cut`).
            loss_of: gives the losses of a micro-batch, whose sum is differentiated; given as a generator, each is
                differentiated before the next is asked for, so that one graph is alive at a time.
            total: what the losses are divided by: the count of the whole step, on all ranks, a scalar.
            context: names this rank's examples in the message of an error.
            logged_total: what is logged is divided by this; None for `total`.

        Raises:
            NonFiniteError: on every rank, with the weights untouched, if a loss or the gradient is not finite.
        """
        parts = self.trained_parts
        measured = parts if len(parts) > 1 else None
        accumulation = GradientAccumulation(self, len(pieces), measured, self.resting_parts, self.part_clip_vals)
        sums: dict[str, Tensor] = {}

        def scaled(losses: Iterable[Loss]) -> Iterator[Tensor]:
            for loss, logged in losses:
                sums.update({name: sums.get(name, 0) + value.detach() for name, value in logged.items()})
                yield loss / total

        casts = cast_once(*self.updating_models) if len(pieces) > 1 else nullcontext()
        random = forked_rng(self.device, self.seed, type(self).__name__, self.trainer.global_step, self.global_rank)
        with random, casts, self.compiled(*self.updating_models):
            for piece in pieces:
                accumulation.backward(scaled(loss_of(piece)))
        try:
            grad_norm = accumulation.step(context)
        except NonFiniteError as error:
            error.examples = pieces
            raise
        means: dict[str, Tensor] = {}
        if sums:
            reduced = sum_over_ranks(self, torch.stack([*sums.values()]))
            means = dict(zip(sums, reduced / (total if logged_total is None else logged_total), strict=True))
        return Step(accumulation.loss, grad_norm, accumulation.part_norms, means)

    def compiled(self, *models: Any) -> AbstractContextManager[None]:
        """Let the layers of models run compiled in a `with` block, if `compile` asks for it.

        Args:
            *models: of which those that are no modules are left out.
        """
        if not self.compiles_layers:
            return nullcontext()
        return compiled_layers(*(model for model in models if isinstance(model, nn.Module)))

    def check_batch(self, batch: Any, kind: type, data: str) -> None:
        """Refuse a batch of another kind of data.

        Args:
            batch: as the loader gave it.
            kind: the NamedTuple whose fields are needed; a batch may be of another class with the same fields.
            data: name of the data module that gives such batches.

        Raises:
            UserError: names a field that is missing.
        """
        needed = [name for name in kind._fields if name not in kind._field_defaults]  # type: ignore[attr-defined]
        missing = [name for name in needed if not hasattr(batch, name)]
        if missing:
            raise UserError(
                f"{type(self).__name__} takes batches like rlhf_lightning.batches.{kind.__name__}, which {data} makes; "
                f"this {type(batch).__name__} has no attribute {missing[0]}"
            )

    # What Lightning calls.

    def configure_model(self) -> None:
        """Load the models and the tokenizer, once.

        What ends a turn in the data's chat template is what generation stops at and what the export's generation config
        lists, so the tokenizer gets that template.

        Raises:
            UserError: something that was named is missing or does not fit.
        """
        if self._is_configured:
            return
        rank_zero_info(
            f"loading {', '.join(map(str, self.parents.values()))}"
        )  # nothing else is said while large models load
        self.tokenizer = load_tokenizer(self.model_name_or_path, self.trust_remote_code)
        theirs = getattr(self.datamodule, "tokenizer", None)
        if isinstance(theirs, PreTrainedTokenizerBase):
            check_same_words(self.tokenizer, theirs)
            if theirs.chat_template is not None:
                self.tokenizer.chat_template = theirs.chat_template
        if fitting := is_fitting(self):
            check_parents(self)
        self.load_models()
        self._is_configured = True
        if fitting:
            self._lineage = lineage_of(self)  # as the files are now, and not after days of training

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add none, and see to those of the trainer.

        Raises:
            UserError: a callback, or another option of the trainer, does not go with manual optimisation.
        """
        keep_checkpoints_whole(self.trainer)
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_trainer(self.trainer)
            let_checkpoints_save(self.trainer)
            keep_logs(self.trainer)
        return []

    def configure_optimizers(self) -> Any:
        """One optimizer (DeepSpeed allows no more), stepped with its schedule; low precision trains float32 copies."""
        trainer: Any = self.trainer
        batches = trainer.estimated_stepping_batches  # also sets up the loader
        if trainer.max_steps > 0:  # in optimizer steps, whereas the estimate mixes them with batches
            epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else float("inf")
            total = min(float(trainer.max_steps), trainer.num_training_batches * epochs * self.steps_per_batch)
        else:
            # Lightning says -1 for a stream without a length, which has no end either.
            total = float(batches) * self.steps_per_batch if batches >= 0 else float("inf")
        self.optimizer_steps = total
        optimizer = fuse(make_optimizer(self.optimizer, self.parameter_groups()), trainer)
        optimizer = with_master_weights(optimizer, trainer)
        scheduler = schedule_learning_rate(
            optimizer, self.lr_schedule, self.warmup_steps, total, min_factor=self.min_lr_factor
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Put what is trained in training mode: `from_pretrained` leaves it in evaluation mode."""
        for part in self.trained_parts.values():
            part.train()
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()  # Lightning validates in inference mode, whose tensors cannot be updated in a fit
        if self.max_tokens_per_batch == "auto" and self.token_budget is not None:
            rank_zero_info(f"max_tokens_per_batch auto: {self.token_budget} tokens per forward and backward pass")
        if self.finetune.mode != "all":
            rank_zero_info(describe_trained(self.export_model, self.finetune))

    def on_fit_end(self) -> None:
        """Say why a run ended before the number of steps that it was given."""
        trainer: Any = self.trainer
        if not 0 < trainer.global_step < trainer.max_steps or trainer.fast_dev_run:
            return
        reached = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch
        limit = f"max_epochs {trainer.max_epochs}, which can be raised," if reached else "a callback or max_time"
        rank_zero_info(f"{limit} ended the run after {trainer.global_step} of max_steps {trainer.max_steps}")


def _warn_of_other_lightning(name: str) -> None:
    if "lightning.pytorch" in sys.modules:
        rank_zero_warn(
            "the package lightning is imported, whose Trainer refuses modules of pytorch_lightning, such as "
            f"{name}: write import pytorch_lightning as L in place of import lightning as L"
        )
