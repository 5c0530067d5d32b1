"""What PPO's policy answers, and what its models say of that; in training, evaluation and prediction alike."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from rlhf_lightning.algorithms.common import equally_many
from rlhf_lightning.algorithms.ppo import checks as ppo_checks
from rlhf_lightning.algorithms.ppo.models import TrunkValue
from rlhf_lightning.algorithms.ppo.rollout import Measurements, measure
from rlhf_lightning.batches import PromptBatch, length_sorted_pieces
from rlhf_lightning.generation.engine import Generation, TransformersEngine, respond
from rlhf_lightning.training import synced
from rlhf_lightning.training.reporting import report_progress

if TYPE_CHECKING:
    from rlhf_lightning.algorithms.ppo.module import PPOModule


def answer(
    module: PPOModule, prompts: PromptBatch, random: torch.Generator, with_logprobs: bool = False
) -> tuple[Generation, list[str]]:
    """Let the policy answer prompts; listeners are told how far it is.

    Args:
        module: the stage, its models loaded; keeps the engine, and with it what was compiled.
        prompts: this rank's, B of them.
        random: source of the random numbers.
        with_logprobs: also keep what an update on the whole rollout needs: log-probabilities, and hidden states where
            the value head reads the policy's.

    Returns:
        Responses as ids and mask, `[B, R]`, and as B texts.
    """
    assert module.tokenizer is not None
    size = module.generation_batch_size
    if module.engine is None:
        module.engine = TransformersEngine(module.export_model, module.tokenizer, size, module.compile_decoding)
    tokens = math.ceil(len(prompts.prompts) / size) * module.sampling.max_new_tokens

    def on_token(done: int) -> None:
        report_progress(module, "generating", done, tokens)

    with_hidden = with_logprobs and isinstance(module.value, TrunkValue)
    fixed = module.sampling, random, synced(module)
    return respond(module.engine, module.tokenizer, prompts, *fixed, on_token, with_logprobs, with_hidden)


def measure_answers(
    module: PPOModule, prompts: PromptBatch, generation: Generation, texts: list[str], with_values: bool = False
) -> Measurements:
    """What policy, reference, reward and, if asked for, value model say of responses.

    Args:
        module: the stage, its models loaded; every process must call this.
        prompts: this rank's.
        generation: the responses.
        texts: the responses as text.
        with_values: without them the values are 0.

    Raises:
        NonFiniteError: on every rank, if a score of any rank is NaN or infinite.
    """
    assert module.reference_model is not None
    assert module.scorer is not None
    lengths = torch.stack([prompts.prompt_mask.sum(dim=1), generation.response_mask.sum(dim=1)], dim=1)
    limits = module.piece_size, module.max_tokens_per_batch
    measured = measure(
        module.export_model,
        module.reference_model,
        module.scorer,
        module.value if with_values else None,
        prompts,
        generation,
        texts,
        module.sampling.temperature,
        equally_many(module, lambda count: length_sorted_pieces(lengths, *limits, count)),
        partial(report_progress, module, "scoring"),
    )
    ppo_checks.check_scores(module, measured.scores, prompts.row_ids)
    return measured
