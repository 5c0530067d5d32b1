"""The parts of a PPO rollout: answer prompts, measure the answers, turn measurements into advantages.

Notation: B batch, P padded prompt length, R padded response length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, split_batch
from rlhf_lightning.controllers import RunningMoments
from rlhf_lightning.experience import Experience, pad_responses
from rlhf_lightning.functional import gae, kl_estimate, kl_shaped_rewards, masked_moments, masked_sum, masked_whiten
from rlhf_lightning.functional.masked import Reduce, identity
from rlhf_lightning.models.causal_lm import response_logprobs
from rlhf_lightning.models.generation import Generation, Sampling, decode_responses, generate
from rlhf_lightning.models.rewarding import Responses, Scorer
from rlhf_lightning.models.scalar_lm import ScalarLM, response_values
from rlhf_lightning.models.tokenizer import filler_id
from rlhf_lightning.ppo_settings import KLPenalty, Objective, ScoreShaping

Report = Callable[[int, int], None]
"""Told how many of how many parts are done."""


def _silent(done: int, total: int) -> None: ...


def respond(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    sampling: Sampling,
    random: torch.Generator | None,
    batch_size: int | None = None,
    synced: bool = False,
    report: Report = _silent,
) -> tuple[Generation, list[str]]:
    """Answer prompts.

    Args:
        policy: a language model.
        tokenizer: the policy's.
        prompts: the prompts, B of them.
        sampling: how responses are drawn.
        random: source of the random numbers; torch's global one if None.
        batch_size: prompts answered at once; None for all.
        synced: every rank runs the same number of forwards (ZeRO-3).
        report: told how many tokens are done.

    Returns:
        Responses as ids and mask, `[B, R]`, and as B texts.
    """
    pieces, limit = [], sampling.max_new_tokens
    chunks = list(split_batch(prompts, batch_size or len(prompts.prompts)))
    for number, chunk in enumerate(chunks):

        def on_token(done: int, before: int = number * limit) -> None:
            report(before + done, len(chunks) * limit)

        ids, mask = chunk.prompt_ids, chunk.prompt_mask
        pieces.append(generate(policy, ids, mask, sampling, tokenizer, random, synced, on_token))
    generation = Generation(
        pad_responses([piece.response_ids for piece in pieces], filler_id(tokenizer)),
        pad_responses([piece.response_mask for piece in pieces], False),
        torch.cat([piece.ended for piece in pieces]),
    )
    return generation, decode_responses(tokenizer, generation)


class Measurements(NamedTuple):
    """What the four models say of responses.

    Attributes:
        logprobs: under the policy, `[B, R]`, nats.
        ref_logprobs: under the reference, `[B, R]`, nats.
        entropy: of the policy before each token, `[B, R]`, nats.
        values: before each token, `[B, R]`.
        scores: raw, `[B]`.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor


@torch.no_grad()
def measure(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    scorer: Scorer,
    value: ScalarLM | None,
    prompts: PromptBatch,
    generation: Generation,
    texts: list[str],
    temperature: float,
    batch_size: int,
    report: Report = _silent,
) -> Measurements:
    """Log-probabilities, values and scores of responses.

    Args:
        policy: the model that generated.
        reference: the frozen reference.
        scorer: gives each response its score.
        value: the value model; None leaves the values 0.
        prompts: the prompts, B of them.
        generation: their responses.
        texts: the responses as text.
        temperature: the sampling temperature.
        batch_size: responses measured at once.
        report: told how many responses are done.
    """
    ids = torch.cat([prompts.prompt_ids, generation.response_ids], dim=1)
    mask = torch.cat([prompts.prompt_mask, generation.response_mask], dim=1)
    pieces, total = [], len(texts)
    for start in range(0, total, batch_size):
        part = slice(start, start + batch_size)
        rows, kept, responses = ids[part], mask[part], generation.response_mask[part]
        logprobs, entropy = response_logprobs(policy, rows, kept, responses, temperature, with_entropy=True)
        ref_logprobs, _ = response_logprobs(reference, rows, kept, responses, temperature)
        values = torch.zeros_like(logprobs) if value is None else response_values(value, rows, kept, responses)
        scores = scorer(Responses(rows, kept, generation.ended[part], prompts.prompts[part], texts[part]))
        pieces.append(Measurements(logprobs, ref_logprobs, entropy, values, scores.float()))
        report(min(start + batch_size, total), total)
    return Measurements(*(torch.cat(column) for column in zip(*pieces, strict=True)))


def shape_scores(scores: Tensor, ended: Tensor, moments: RunningMoments, shaping: ScoreShaping) -> Tensor:
    """Scale, clip and penalise scores, in this order.

    Args:
        scores: raw, `[B]`.
        ended: True where the response ended by itself, `[B]`, bool.
        moments: running moments, these scores included.
        shaping: what is to be done.

    Returns:
        `[B]`.

    Example:
        >>> ended = torch.tensor([True, False])
        >>> shape_scores(torch.tensor([9.0, 0.5]), ended, RunningMoments(), ScoreShaping(False, 5.0, 1.0))
        tensor([ 5.0000, -0.5000])
    """
    if shaping.scaling:
        scores = moments.scale(scores)
    if shaping.clip is not None:
        scores = scores.clamp(-shaping.clip, shaping.clip)
    return scores - shaping.missing_eos_penalty * (~ended)


def build_experience(
    prompts: PromptBatch,
    generation: Generation,
    measured: Measurements,
    shaped_scores: Tensor,
    kl: KLPenalty,
    kl_coef: float,
    objective: Objective,
    reduce: Reduce = identity,
) -> Experience:
    """From scores and log-probabilities to rewards, advantages and returns.

    Args:
        prompts: the prompts, B of them.
        generation: their responses.
        measured: what the models say of them.
        shaped_scores: scores as they enter the rewards, `[B]`.
        kl: which estimator is the penalty.
        kl_coef: the weight of the penalty now.
        objective: discounts and whitening.
        reduce: sums a tensor over all ranks.
    """
    mask = generation.response_mask
    penalty = kl_estimate(measured.logprobs, measured.ref_logprobs, kl.estimator)
    rewards = kl_shaped_rewards(shaped_scores, penalty, mask, kl_coef)
    advantages, returns = gae(rewards, measured.values, mask, objective.gamma, objective.gae_lambda)
    if objective.whiten_advantages:
        advantages = masked_whiten(advantages, mask, reduce=reduce)
    return Experience(
        prompt_ids=prompts.prompt_ids,
        prompt_mask=prompts.prompt_mask,
        response_ids=generation.response_ids,
        response_mask=mask,
        ended=generation.ended,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        row_ids=prompts.row_ids,
        **measured._asdict(),
    )


def experience_metrics(experience: Experience, reduce: Reduce = identity) -> dict[str, Tensor]:
    """What is logged of a rollout, over all ranks.

    Args:
        experience: this rank's share.
        reduce: sums a tensor over all ranks.

    Returns:
        Scalars. `score`, `score_std`, `reward` (per response, KL penalty included), `kl` and `kl_k3` (per response, in
        nats), `response_length` (tokens) and `eos_rate` are over responses; `entropy` (nats) is over tokens.
        `explained_variance` is `1 - Var(returns - values) / Var(returns)` over tokens.
    """
    mask = experience.response_mask
    sums = torch.stack(
        [
            mask.new_tensor(len(mask), dtype=torch.float32),
            mask.sum().float(),
            masked_sum(experience.rewards, mask),
            masked_sum(kl_estimate(experience.logprobs, experience.ref_logprobs, "k1"), mask),
            masked_sum(kl_estimate(experience.logprobs, experience.ref_logprobs, "k3"), mask),
            experience.ended.sum().float(),
            masked_sum(experience.entropy, mask),
        ]
    )
    responses, tokens, reward, kl, kl_k3, ended, entropy = reduce(sums)
    _, score, score_variance = masked_moments(experience.scores, torch.ones_like(experience.ended), reduce)
    _, _, unexplained = masked_moments(experience.returns - experience.values, mask, reduce)
    _, _, variance = masked_moments(experience.returns, mask, reduce)
    return {
        "score": score,
        "score_std": score_variance.sqrt(),
        "reward": reward / responses,
        "kl": kl / responses,
        "kl_k3": kl_k3 / responses,
        "response_length": tokens / responses,
        "eos_rate": ended / responses,
        "entropy": entropy / tokens,
        "explained_variance": 1 - unexplained / variance.clamp(min=1e-8),
    }
