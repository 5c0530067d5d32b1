"""What algorithms that learn from pairs share: reward modelling and DPO.

Notation: B pairs, T padded length; S sequences, which of pairs are both sides of each, of rankings each response once.
Both sides of a pair go through the model together, and so do all responses of a ranking; what they begin with, the
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

from rlhf_lightning.algorithms.rankings import Responses, pairs_of, responses_of
from rlhf_lightning.algorithms.stage import Loss, Stage
from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.batches import PreferenceBatch, RankingBatch, micro_batches, name_rows
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
        rows: the same as rows that share their beginning; None to run all sequences apart.
        responses: of rankings, where each stands once; None where each pair has two sequences of its own.
    """

    batch: PreferenceBatch
    rows: SharedRows | None = None
    responses: Responses | None = None

    @classmethod
    def of(cls, batch: PreferenceBatch | RankingBatch, shared: bool) -> Pairs:
        """Lay pairs, or all pairs of rankings, out.

        Args:
            batch: the pairs.
            shared: run what both sides, or all responses of a ranking, begin with only once.
        """
        rows = share_rows(*on_host(*sequences_of(batch))) if shared else None
        if rows is not None:
            rows = SharedRows(*(to_device(field, batch.row_ids.device) for field in rows))
        if not isinstance(batch, RankingBatch):
            return cls(batch, rows)
        responses = responses_of(batch)
        return cls(pairs_of(batch, responses), rows, responses)

    @property
    def sequences(self) -> tuple[Tensor, Tensor]:
        """Ids and mask of what the model reads, both `[S, T]`."""
        if self.responses is not None:
            return self.responses.ids, self.responses.mask
        ids, mask = both_sides(self.batch)
        return ids.flatten(0, 1), alike(lambda mask: mask.flatten(0, 1), mask)

    def response_mask(self) -> Tensor:
        """True for the tokens of the response of each sequence, the prompt not among them, `[S, T]`, bool."""
        if self.responses is None:
            return alike(lambda mask: mask.flatten(0, 1), response_mask(self.batch))
        if self.responses.prompt_lengths is None:
            raise _unknown_prompts("RankingBatch")
        return alike(_after_prompt, self.responses.mask, self.responses.prompt_lengths)

    def read(self, model: PreTrainedModel) -> Tensor:
        """Last hidden states as they are laid out, in one forward pass: `[R, L, D]` of R shared rows, else `[S, T, D]`.

        Args:
            model: a language model or a scalar model.
        """
        return hidden_states(model, *self.sequences) if self.rows is None else self.rows.hidden_states(model)

    def of_sequences(self, values: Tensor) -> Tensor:
        """Give every token of all sequences what was computed for it.

        Args:
            values: of the tokens that `read` speaks of, in its layout, `[..., ...]` or `[..., ..., D]`.

        Returns:
            `[S, T]` or `[S, T, D]`.
        """
        if self.rows is None:
            return values
        spread = self.rows.spread(values).flatten(0, 1)
        return spread if self.responses is None else spread.index_select(0, self.responses.places)

    def of_pairs(self, values: Tensor) -> Tensor:
        """Give both sides of every pair what is known of their sequences.

        Args:
            values: `[S, ...]`.

        Returns:
            `[B, 2, ...]`.
        """
        if self.responses is None:
            pairs: Tensor = values.unflatten(0, (-1, 2))
            return pairs
        sides = self.responses.sides
        return values.index_select(0, sides.flatten()).view(*sides.shape, *values.shape[1:])

    def spread(self, values: Tensor) -> Tensor:
        """Give every token of both sides what was computed for it.

        Args:
            values: of the tokens that `read` speaks of, in its layout, `[..., ...]` or `[..., ..., D]`.

        Returns:
            `[B, 2, T]` or `[B, 2, T, D]`.
        """
        return self.of_pairs(self.of_sequences(values))

    def chosen_responses(self) -> tuple[Tensor, Tensor]:
        """Ids of the C sequences that are chosen in some pair, and a mask of their responses, both `[C, T]`."""
        if self.responses is None:
            return self.batch.chosen_ids, alike(lambda mask: mask[:, 0], response_mask(self.batch))
        chosen = self.responses.chosen
        return self.responses.ids[chosen], alike(lambda mask, chosen: mask[chosen], self.response_mask(), chosen)

    def of_chosen(self, hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Hidden states of some tokens of these sequences, without a copy of all the others, `[N, D]`.

        Args:
            hidden: from `read`.
            rows: number of the sequence of each token, `[N]`, int64.
            columns: place of each token in its sequence, `[N]`, int64.
        """
        if self.responses is None:
            return hidden[2 * rows, columns] if self.rows is None else hidden[rows, self.rows.places[rows, 0, columns]]
        chosen = self.responses.chosen[rows]
        if self.rows is None:
            return hidden[chosen, columns]
        place = self.responses.places[chosen]  # among B * K
        return hidden[place // self.rows.places.shape[1], self.rows.places.flatten(0, 1)[place, columns]]

    def of_chosen_pairs(self, values: Tensor) -> Tensor:
        """Give every pair what is known of its chosen sequence.

        Args:
            values: of those that `chosen_responses` names, `[C]`.

        Returns:
            `[B]`.
        """
        return values if self.responses is None else values[self.responses.chosen_of]

    def hidden_states(self, model: PreTrainedModel) -> Tensor:
        """Last hidden states of chosen and rejected sequences, `[B, 2, T, D]`, in one forward pass.

        Args:
            model: a language model or a scalar model.
        """
        return self.spread(self.read(model))

    @property
    def data(self) -> Tensor:
        """Mask of the sequences as the data hold them, any shape, bool."""
        return both_sides(self.batch)[1] if self.responses is None else self.responses.mask

    @property
    def shown(self) -> Tensor:
        """Mask of what the model is really shown, any shape, bool."""
        return self.data if self.rows is None else self.rows.mask


def pair_weights(batch: PreferenceBatch) -> Tensor:
    """How much each pair counts, `[B]`, float32."""
    if batch.weights is None:
        return torch.ones(len(batch.row_ids), dtype=torch.float32, device=batch.row_ids.device)
    return batch.weights.float()  # the Trainer gives batches the type of the weights


def as_pairs(batch: PreferenceBatch | RankingBatch) -> PreferenceBatch:
    """The pairs of a batch, of rankings all of them."""
    return pairs_of(batch) if isinstance(batch, RankingBatch) else batch


def sequences_of(batch: PreferenceBatch | RankingBatch) -> tuple[Tensor, Tensor]:
    """Ids and mask of what belongs together, `[G, K, T]` both: both sides of a pair, or all responses to a prompt."""
    return (batch.input_ids, batch.attention_mask) if isinstance(batch, RankingBatch) else both_sides(batch)


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
        raise _unknown_prompts("PreferenceBatch")
    return alike(_after_prompt, both_sides(batch)[1], batch.prompt_lengths)


def _after_prompt(mask: Tensor, lengths: Tensor) -> Tensor:
    """A mask `[B, T]` or `[B, 2, T]` without the prompts of these lengths, `[B]`."""
    begins = lengths.view(-1, *(1,) * (mask.dim() - 1))
    return mask & (torch.arange(mask.shape[-1], device=mask.device) >= begins)


def _unknown_prompts(kind: str) -> UserError:
    return UserError(f"the batches do not say how long their prompts are: set {kind}.prompt_lengths, [B]")


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
    # Token t is predicted from t - 1, [S, T - 1].
    ids = pairs.sequences[0][:, 1:]
    counted = alike(lambda mask: mask[:, 1:], pairs.response_mask())
    where = places_of(counted).rows, places_of(counted).columns
    hidden = pairs.of_sequences(pairs.read(model))[:, :-1][where]  # [N, D]
    logprobs, _ = token_logprobs_at(model, hidden, ids[where], temperature=1.0, with_entropy=False)
    spread = torch.zeros(counted.shape, dtype=logprobs.dtype, device=ids.device).index_put(where, logprobs)
    # An empty response has log-probability 0.
    return pairs.of_pairs(spread.sum(dim=1)), pairs.of_pairs(counted.sum(dim=1)).clamp(min=1)


class PairStage(Stage):
    """Learns from pairs, each of which counts by its weight, in the loss and in every metric.

    An algorithm says what is known of each pair (`pair_metrics`) and under which names (`LOGGED`).

    Args:
        model_name_or_path: Hugging Face folder or hub id of the model to start from.
        prefix_sharing: run what both responses of a pair begin with, the prompt and often more, only once. The results
            are the same to rounding; a model or attention kernel that cannot do it says so and runs both apart.
        dropout: keep the dropout that the model's config asks for; by default it is off.
        **options: those of `Stage`. An example is a pair, or a prompt with all pairs of its responses.

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

    def training_step(self, batch: PreferenceBatch | RankingBatch, batch_idx: int) -> Tensor:
        """One optimizer step on one batch; returns its loss, detached, for callbacks."""
        self.check_pairs(batch)
        started, lr = time.perf_counter(), self.learning_rates()[0]
        _read(batch)
        pieces, pairs = self._pieces(batch), as_pairs(batch)
        counts = torch.stack([pair_weights(pairs).sum(), chosen_tokens(pairs).sum()])
        # Only pairs of weight 0 sum to 0.
        total, tokens = sum_over_ranks(self, counts).clamp(min=torch.finfo(torch.float32).tiny)
        self.pairs_per_token = (total / tokens).nan_to_num(posinf=0.0)  # where all responses are empty
        step = self.optimise(pieces, self.losses, total, name_rows(batch.row_ids))
        # The speed is that of the data, the padding that of what was run.
        metrics: dict[str, Any] = {"objective": step.loss} if "loss" in step.means else {"loss": step.loss}
        metrics |= {**step.means, "lr": lr, "grad_norm": step.grad_norm}
        metrics |= self.throughput([piece.data for piece in pieces], started, [piece.shown for piece in pieces])
        self.log_metrics(metrics, on_bar="loss", batch_size=len(batch.row_ids))
        return step.loss

    def check_pairs(self, batch: Any) -> None:
        """Refuse a batch of another kind of data."""
        self.check_batch(
            batch, RankingBatch if isinstance(batch, RankingBatch) else PreferenceBatch, "PreferenceDataModule"
        )

    def _pieces(self, batch: PreferenceBatch | RankingBatch) -> list[Pairs]:
        """Micro-batches, laid out before the first forward pass, so that none waits for lengths from the device."""
        shares = self._shares(batch)
        lengths = shared_lengths(*on_host(*sequences_of(batch))) if shares else None
        size, max_tokens = self.micro_batch_size, self.token_budget
        pieces = self.cut(lambda least: micro_batches(batch, size, max_tokens, least, lengths))
        return [Pairs.of(piece, shares) for piece in pieces]

    def _shares(self, batch: PreferenceBatch | RankingBatch) -> bool:
        if not self.prefix_sharing:
            return False
        ids, mask = on_host(*sequences_of(batch))
        pays = [sharing_pays(model, ids, mask) for model in self.readers]  # each process asks for all
        return all(pays)

    def laid_out(self, batch: PreferenceBatch | RankingBatch) -> Pairs:
        """A whole batch in one piece."""
        return Pairs.of(batch, self._shares(batch))

    @property
    def readers(self) -> list[PreTrainedModel]:
        """The models that read the pairs."""
        return [self.export_model]

    def evaluate(self, batch: PreferenceBatch | RankingBatch, task: str) -> dict[str, Tensor]:
        """Log means over a validation or test set; what is known of this batch's pairs, each `[B]`.

        Args:
            batch: pairs, or rankings of which all pairs are meant.
            task: `val` or `test`.
        """
        self.check_pairs(batch)
        pairs = self.laid_out(batch)
        losses, logged = self.pair_metrics(pairs)
        for name, value in {"loss": losses, **logged}.items():
            metric: Any = self.eval_means[name]
            metric.update(value, pair_weights(pairs.batch))
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

    def validation_step(self, batch: PreferenceBatch | RankingBatch, batch_idx: int) -> None:
        """Means over the whole validation set."""
        self.evaluate(batch, "val")

    def test_step(self, batch: PreferenceBatch | RankingBatch, batch_idx: int) -> None:
        """Means over the whole test set."""
        self.evaluate(batch, "test")


def _read(batch: PreferenceBatch | RankingBatch) -> None:
    """Read all that the layout of micro-batches depends on, and all that a step reads until its losses are there."""
    if isinstance(batch, RankingBatch):
        read = [batch.input_ids, batch.attention_mask, batch.pairs]
    else:
        read = [batch.chosen_ids, batch.chosen_mask, batch.rejected_ids, batch.rejected_mask]
    on_host(*read, batch.row_ids, *([] if batch.prompt_lengths is None else [batch.prompt_lengths]))


def mean_metrics(*names: str) -> nn.ModuleDict:
    """One mean over a validation or test set for each name; sums stay float32."""
    return nn.ModuleDict({name: keep_dtype(MeanMetric()) for name in names})
