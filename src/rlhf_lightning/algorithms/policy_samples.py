"""Answers of a policy to held-out prompts, over which a reward model is calibrated.

Ziegler et al. 2019, section 2, normalise the reward to mean 0 and variance 1 over samples of the policy that training
starts from. Here that is done of the trained model. Left out: normalising the fresh head before training, too, whose
scale the learning rate would then no longer be for.

Notation: N answers, T padded length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.algorithms.pairs import Pairs
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.batches import length_sorted_pieces
from rlhf_lightning.chat.writer import REWRITES
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import evaluation_mode
from rlhf_lightning.forward.capacity import context_length
from rlhf_lightning.functional import scores_at_end
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.host import on_host
from rlhf_lightning.models.causal_lm import freeze, load_causal_lm
from rlhf_lightning.models.scalar_lm import ScalarLM, has_reward_head
from rlhf_lightning.models.tokenizer import check_same_words, filler_id, load_tokenizer
from rlhf_lightning.rng import forked_rng
from rlhf_lightning.training import gather_objects

_AT_ONCE = 32
"""Prompts that are answered together."""


class PolicySamples:
    """Answers to prompts of the validation data, drawn once, before the first step.

    Args:
        policy: folder or hub id of the language model that answers; None for the one that training starts from.
        count: how many, at most one to each prompt.
        sampling: how they are drawn.

    Attributes:
        sequences: N times ids of prompt and answer, `[t]`, int64, on the host; the same on every process.
    """

    def __init__(self, policy: str | None, count: int, sampling: Sampling) -> None:
        self.policy, self.count, self.sampling = policy, count, sampling
        self.sequences: list[Tensor] = []
        self._model: PreTrainedModel | None = None

    def load(self, stage: Stage) -> None:
        """Load the policy whole, before a strategy loads the models of training, which may be in parts.

        Args:
            stage: in its `setup`.

        Raises:
            UserError: there is no language model at that place, or none is named and training starts from another kind.
        """
        name = self.policy or stage.model_name_or_path
        if self.policy is None and has_reward_head(name):
            raise UserError(
                f"calibration_samples are answers of a language model, and '{name}' is a reward model: name the "
                "language model as calibration_policy"
            )
        self.policy = name
        # What is loaded may draw random numbers.
        with (
            forked_rng(stage.trainer.strategy.root_device, "policy"),
            stage.trainer.precision_plugin.module_init_context(),
        ):
            self._model = load_causal_lm(name, trust_remote_code=stage.trust_remote_code)
        freeze(self._model)

    @torch.no_grad()
    def draw(self, stage: Stage, loader: Any) -> None:
        """Answer the prompts, each process its share, and let the policy go; every process must call it.

        A response depends on the seed of the run and the row of its prompt alone, so that a resumed run has the same.

        Args:
            stage: in its `on_train_start`, when a checkpoint has given it its seed.
            loader: of the validation data; nothing where there are none.

        Raises:
            UserError: there are no validation data, or they are a stream, or tell no prompts that leave room for an
                answer.
        """
        if not loader:
            raise UserError(
                "calibration_samples are answers to held-out prompts, and there is no validation data: set "
                "--data.validation_split 0.05"
            )
        assert self._model is not None
        assert self.policy is not None
        model, tokenizer = self._model, self._tokenizer(self.policy, stage)
        prompts = self._prompts(stage, model, loader)
        _say_rewritten(stage)
        rank_zero_info(f"{self.policy} answers {len(prompts)} held-out prompts, once, to calibrate by")
        random = stage.random_by_row(torch.tensor([row for row, _ in prompts]), "policy samples")
        share = slice(stage.global_rank, None, stage.trainer.world_size)
        asked = [ids for _, ids in prompts[share]]
        answers: list[Tensor] = []
        if asked:
            engine = TransformersEngine(model.to(stage.device), tokenizer, _AT_ONCE)  # type: ignore[arg-type]
            ids, mask = (each.to(stage.device) for each in _padded(asked, filler_id(tokenizer), "left"))
            with stage.trainer.precision_plugin.forward_context():
                generation = engine.generate(ids, mask, self.sampling, generator=random[share])
            said = zip(*on_host(generation.response_ids, generation.response_mask), strict=True)
            answers = [response[real] for response, real in said]
        self._model = None
        mine = [torch.cat(both).tolist() for both in zip(asked, answers, strict=True)]
        everyone = gather_objects(stage.trainer, mine)
        ranks = len(everyone)
        self.sequences = [torch.tensor(everyone[i % ranks][i // ranks]) for i in range(len(prompts))]

    @staticmethod
    def _tokenizer(name: str, stage: Stage) -> PreTrainedTokenizerBase:
        """The policy's own, as the stage's may pad with a token that the policy lacks; it ends turns as the data do."""
        tokenizer = load_tokenizer(name, stage.trust_remote_code)
        check_same_words(tokenizer, stage.tokenizer)
        tokenizer.chat_template = stage.tokenizer.chat_template
        return tokenizer

    def _prompts(self, stage: Stage, model: PreTrainedModel, loader: Any) -> list[tuple[int, Tensor]]:
        """Row and ids, `[p]`, of prompts from all over the validation data, none of them twice."""
        contexts = [context_length(each.config) for each in (model, stage.export_model)]
        room = min((context for context in contexts if context is not None), default=None)
        every = {tuple(ids): row for row, ids in reversed([*_prompts_of(loader)])}  # the first row of each
        fitting = [
            (row, torch.tensor(ids))
            for ids, row in reversed(every.items())
            if room is None or len(ids) + self.sampling.max_new_tokens <= room
        ]
        if not fitting:
            raise UserError(
                f"calibration_samples: no held-out prompt leaves room for {self.sampling.max_new_tokens} tokens of an "
                f"answer in a context of {room}; lower sampling.max_new_tokens"
            )
        if len(fitting) < len(every):
            rank_zero_info(f"{len(every) - len(fitting)} of {len(every)} held-out prompts leave no room for an answer")
        count = min(self.count, len(fitting))
        return [fitting[i * len(fitting) // count] for i in range(count)]

    @torch.no_grad()
    def scores(self, stage: Stage, scalar: ScalarLM) -> Tensor:
        """Raw score of each at its last token, `[N]`, float64, on the host.

        Args:
            stage: whose limits of a forward pass count.
            scalar: scores them, on every process all of them.
        """
        lengths = torch.tensor([len(ids) for ids in self.sequences])
        found = torch.zeros(len(lengths), dtype=torch.float64)
        pieces = length_sorted_pieces(lengths, stage.micro_batch_size, stage.token_budget)
        with evaluation_mode(stage.export_model), stage.trainer.precision_plugin.forward_context():
            for rows in pieces:
                padded = _padded([self.sequences[row] for row in rows.tolist()], filler_id(stage.tokenizer), "right")
                ids, mask = (each.to(stage.device) for each in padded)
                found[rows] = scores_at_end(scalar.raw(ids, mask), mask).double().cpu()
        return found


def _say_rewritten(stage: Stage) -> None:
    """Say that the template's generation prompt says more than the prompts of the pairs, which the answers follow."""
    counts: dict[str, int] = getattr(stage.datamodule, "counts", None) or {}
    if any(count and name.endswith(REWRITES) for name, count in counts.items()):
        rank_zero_warn(
            "calibration_samples follow the prompts of the pairs, without what the chat template only adds where it is "
            "to be answered, such as `<think>`; PPO is given it, and may begin at another score than 0"
        )


def _prompts_of(loader: Any) -> Iterator[tuple[int, list[int]]]:
    """Row and ids of the prompt of every pair of a loader's data, in their own order."""
    if not hasattr(loader, "dataset") or isinstance(loader.dataset, IterableDataset):
        raise UserError(
            "calibration_samples needs validation data that do not come as a stream: give a map-style DataLoader"
        )
    size = loader.batch_size or (None if loader.batch_sampler is None else loader.batch_sampler.batch_size)
    for batch in DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn):
        laid_out = Pairs.of(batch, shared=False)
        laid_out.response_mask()  # refuses a batch that does not say how long its prompts are
        pairs = laid_out.batch
        assert pairs.prompt_lengths is not None
        columns = pairs.row_ids.tolist(), pairs.prompt_lengths.tolist(), pairs.chosen_ids
        yield from ((row, ids[:length].tolist()) for row, length, ids in zip(*columns, strict=True) if row >= 0)


def _padded(sequences: list[Tensor], filler: int, side: str) -> tuple[Tensor, Tensor]:
    """Ids and a mask that is True for real tokens, both `[B, T]`."""
    ids = pad_sequence(sequences, batch_first=True, padding_value=filler, padding_side=side)
    real = [torch.ones(len(each), dtype=torch.bool) for each in sequences]
    return ids, pad_sequence(real, batch_first=True, padding_value=False, padding_side=side)
