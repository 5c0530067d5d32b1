"""What algorithms that learn from pairs share: reward modelling and DPO.

Notation: B pairs, T padded length. Both sides of a pair go through the model together, and what both begin with, the
prompt and often more, is run only once where the model can.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.stage import Loss, Stage
from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import PreferenceBatch, micro_batches, name_rows
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.hidden import hidden_states
from rlhf_lightning.forward.output_layer import token_logprobs_at
from rlhf_lightning.forward.prefix import SharedRows, share_rows, shared_lengths, sharing_pays
from rlhf_lightning.host import alike, on_host, places_of, to_device
from rlhf_lightning.models.dtypes import keep_dtype
from rlhf_lightning.training import sum_over_ranks


class Pairs(NamedTuple):
    """Pairs, laid out before the first forward pass, so that none waits for lengths from the device.

    Attributes:
        batch: the pairs.
        rows: the same as rows that share their beginning; None to run both sides apart.
    """

    batch: PreferenceBatch
    rows: SharedRows | None = None

    @classmethod
    def of(cls, batch: PreferenceBatch, shared: bool) -> Pairs:
        """Lay pairs out.

        Args:
            batch: the pairs.
            shared: run what both sides begin with only once.
        """
        if not shared:
            return cls(batch)
        rows = share_rows(*on_host(*both_sides(batch)))
        return cls(batch, SharedRows(*(to_device(field, batch.chosen_ids.device) for field in rows)))

    def read(self, model: PreTrainedModel) -> Tensor:
        """Last hidden states as they are laid out, in one forward pass: `[B, L, D]` of shared rows, else `[2 B, T, D]`.

        Args:
            model: a language model or a scalar model.
        """
        if self.rows is not None:
            return self.rows.hidden_states(model)
        ids, mask = both_sides(self.batch)
        return hidden_states(model, ids.flatten(0, 1), alike(lambda mask: mask.flatten(0, 1), mask))

    def spread(self, values: Tensor) -> Tensor:
        """Give every token of both sides what was computed for it.

        Args:
            values: of the tokens that `read` speaks of, in its layout, `[..., ...]` or `[..., ..., D]`.

        Returns:
            `[B, 2, T]` or `[B, 2, T, D]`.
        """
        return values.unflatten(0, (-1, 2)) if self.rows is None else self.rows.spread(values)

    def of_chosen(self, hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Hidden states of some tokens of the chosen sides, without a copy of all the others, `[N, D]`.

        Args:
            hidden: from `read`.
            rows: number of the pair of each token, `[N]`, int64.
            columns: place of each token in its sequence, `[N]`, int64.
        """
        if self.rows is None:
            return hidden[2 * rows, columns]
        return hidden[rows, self.rows.places[rows, 0, columns]]

    def hidden_states(self, model: PreTrainedModel) -> Tensor:
        """Last hidden states of chosen and rejected sequences, `[B, 2, T, D]`, in one forward pass.

        Args:
            model: a language model or a scalar model.
        """
        return self.spread(self.read(model))

    @property
    def shown(self) -> Tensor:
        """Mask of what the model is really shown, any shape, bool."""
        return both_sides(self.batch)[1] if self.rows is None else self.rows.mask


def pair_weights(batch: PreferenceBatch) -> Tensor:
    """How much each pair counts, `[B]`, float32."""
    if batch.weights is None:
        return torch.ones(len(batch.row_ids), dtype=torch.float32, device=batch.row_ids.device)
    return batch.weights.float()  # the Trainer gives batches the type of the weights


def both_sides(batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask of chosen and rejected sequences, each `[B, 2, T]`."""
    ids = alike(_stacked, batch.chosen_ids, batch.rejected_ids)
    return ids, alike(_stacked, batch.chosen_mask, batch.rejected_mask)


def _stacked(chosen: Tensor, rejected: Tensor) -> Tensor:
    return torch.stack([chosen, rejected], dim=1)


def response_mask(batch: PreferenceBatch) -> Tensor:
    """True for the tokens of each response, the prompt not among them, `[B, 2, T]`, bool.

    Raises:
        UserError: the batch does not say how long its prompts are.
    """
    if batch.prompt_lengths is None:
        raise UserError("the batches do not say how long their prompts are: set PreferenceBatch.prompt_lengths, [B]")

    def answered(mask: Tensor, lengths: Tensor) -> Tensor:
        return mask & (torch.arange(mask.shape[2], device=mask.device) >= lengths.view(-1, 1, 1))

    return alike(answered, both_sides(batch)[1], batch.prompt_lengths)


def chosen_tokens(batch: PreferenceBatch) -> Tensor:
    """Tokens of each chosen response, times the weight of its pair, `[B]`, float32; 0 where prompts have no length."""
    if batch.prompt_lengths is None:
        return torch.zeros(len(batch.row_ids), device=batch.row_ids.device)
    return pair_weights(batch) * response_mask(batch)[:, 0, 1:].sum(dim=1)


def response_logprobs(model: PreTrainedModel, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Log-probability of each response given its prompt, in nats, and its number of tokens, at least 1, both `[B, 2]`.

    Args:
        model: a language model.
        pairs: B of them.
    """
    # Rows of both sides, one after the other, [2 B, T - 1]; token t is predicted from t - 1.
    ids = both_sides(pairs.batch)[0].flatten(0, 1)[:, 1:]
    counted = alike(lambda mask: mask.flatten(0, 1)[:, 1:], response_mask(pairs.batch))
    where = places_of(counted).rows, places_of(counted).columns
    hidden = pairs.hidden_states(model).flatten(0, 1)[:, :-1][where]  # [N, D]
    logprobs, _ = token_logprobs_at(model, hidden, ids[where], temperature=1.0, with_entropy=False)
    spread = torch.zeros(counted.shape, dtype=logprobs.dtype, device=ids.device).index_put(where, logprobs)
    # An empty response has log-probability 0.
    return spread.sum(dim=1).view(-1, 2), counted.sum(dim=1).view(-1, 2).clamp(min=1)


class PairStage(Stage):
    """Learns from pairs, each of which counts by its weight, in the loss and in every metric.

    An algorithm says what is known of each pair (`pair_metrics`) and under which names (`LOGGED`).

    Args:
        model_name_or_path: Hugging Face folder or hub id of the model to start from.
        prefix_sharing: run what both responses of a pair begin with, the prompt and often more, only once. The results
            are the same to rounding; a model or attention kernel that cannot do it says so and runs both apart.
        dropout: keep the dropout that the model's config asks for; by default it is off.
        **options: those of `Stage`. An example is a pair.

    Attributes:
        pairs_per_token: pairs of an optimizer step, by the tokens of their chosen responses, each pair as often as it
            counts, on all ranks, a scalar.
    """

    pairs_per_token: Tensor
    sequences_per_example = 2
    LOGGED: tuple[str, ...] = ()

    def __init__(
        self, model_name_or_path: str, *, prefix_sharing: bool = True, dropout: bool = False, **options: Any
    ) -> None:
        check_arguments(PairStage, locals())
        super().__init__(model_name_or_path, **options)
        self.prefix_sharing = prefix_sharing
        self.dropout = dropout
        self.eval_means = mean_metrics("loss", *self.LOGGED)

    def pair_metrics(self, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each pair, `[B]`, and what else is logged of it, each `[B]`, without gradient.

        Args:
            pairs: B of them.
        """
        raise NotImplementedError

    def losses(self, pairs: Pairs) -> Iterator[Loss]:
        """The loss of a micro-batch, and what is logged of it, summed over pairs by their weights.

        Args:
            pairs: B of them.
        """
        losses, logged = self.pair_metrics(pairs)
        weights = pair_weights(pairs.batch)
        yield (losses * weights).sum(), {name: (value * weights).sum() for name, value in logged.items()}

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One optimizer step on one batch; returns its loss, detached, for callbacks."""
        self.check_batch(batch, PreferenceBatch, "PreferenceDataModule")
        started, lr = time.perf_counter(), self.learning_rates()[0]
        _read(batch)
        pieces = self._pieces(batch)
        counts = torch.stack([pair_weights(batch).sum(), chosen_tokens(batch).sum()])
        # Only pairs of weight 0 sum to 0.
        total, tokens = sum_over_ranks(self, counts).clamp(min=torch.finfo(torch.float32).tiny)
        self.pairs_per_token = (total / tokens).nan_to_num(posinf=0.0)  # where all responses are empty
        step = self.optimise(pieces, self.losses, total, name_rows(batch.row_ids))
        # The speed is that of the data, the padding that of what was run.
        data, shown = [both_sides(piece.batch)[1] for piece in pieces], [piece.shown for piece in pieces]
        metrics: dict[str, Any] = {"objective": step.loss} if "loss" in step.means else {"loss": step.loss}
        metrics |= {**step.means, "lr": lr, "grad_norm": step.grad_norm}
        metrics |= self.throughput(data, started, shown)
        self.log_metrics(metrics, on_bar="loss", batch_size=len(batch.row_ids))
        return step.loss

    def _pieces(self, batch: PreferenceBatch) -> list[Pairs]:
        """Micro-batches, laid out before the first forward pass, so that none waits for lengths from the device."""
        shares = self._shares(batch)
        lengths = shared_lengths(*on_host(*both_sides(batch))) if shares else None
        size, max_tokens = self.micro_batch_size, self.token_budget
        pieces = self.cut(lambda least: micro_batches(batch, size, max_tokens, least, lengths))
        return [Pairs.of(piece, shares) for piece in pieces]

    def _shares(self, batch: PreferenceBatch) -> bool:
        if not self.prefix_sharing:
            return False
        ids, mask = on_host(*both_sides(batch))
        pays = [sharing_pays(model, ids, mask) for model in self.readers]  # each process asks for all
        return all(pays)

    @property
    def readers(self) -> list[PreTrainedModel]:
        """The models that read the pairs."""
        return [self.export_model]

    def evaluate(self, batch: PreferenceBatch, task: str) -> dict[str, Tensor]:
        """Log means over a validation or test set; what is known of this batch's pairs, each `[B]`.

        Args:
            batch: pairs.
            task: `val` or `test`.
        """
        self.check_batch(batch, PreferenceBatch, "PreferenceDataModule")
        losses, logged = self.pair_metrics(Pairs.of(batch, self._shares(batch)))
        for name, value in {"loss": losses, **logged}.items():
            metric: Any = self.eval_means[name]
            metric.update(value, pair_weights(batch))
            on_bar = name in ("loss", "accuracy")
            self.log(f"{task}/{name}", metric, prog_bar=on_bar, batch_size=len(batch.row_ids))
        return logged

    def setup(self, stage: str) -> None:
        """Refuse to predict where an algorithm says nothing of single sequences.

        Raises:
            UserError: says what answers prompts instead.
        """
        if stage == "predict" and type(self).predict_step is PairStage.predict_step:
            raise UserError(
                f"{type(self).__name__} predicts nothing: rlhf predict --config sft.yaml answers prompts with what it "
                "exported"
            )

    def predict_step(self, *args: Any) -> Any:
        """Overridden by algorithms that say something of single sequences; see `setup`."""
        raise NotImplementedError

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Means over the whole validation set."""
        self.evaluate(batch, "val")

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Means over the whole test set."""
        self.evaluate(batch, "test")


def _read(batch: PreferenceBatch) -> None:
    """Read all that the layout of micro-batches depends on, and all that a step reads until its losses are there."""
    read = batch.chosen_ids, batch.chosen_mask, batch.rejected_ids, batch.rejected_mask, batch.row_ids
    on_host(*read, *(() if batch.prompt_lengths is None else (batch.prompt_lengths,)))


def mean_metrics(*names: str) -> nn.ModuleDict:
    """One mean over a validation or test set for each name; sums stay float32."""
    return nn.ModuleDict({name: keep_dtype(MeanMetric()) for name in names})
