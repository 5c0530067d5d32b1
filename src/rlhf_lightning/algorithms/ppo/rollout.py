"""The parts of a PPO rollout: answer prompts, measure the answers, turn measurements into advantages.

Notation: B batch, P padded prompt length, R padded response length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.ppo.controllers import RunningMoments
from rlhf_lightning.algorithms.ppo.experience import Experience
from rlhf_lightning.algorithms.ppo.models import TrunkValue, logprobs_and_values, values_alone
from rlhf_lightning.algorithms.ppo.settings import KLPenalty, Objective, ScoreShaping
from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.forward.hidden import response_logprobs
from rlhf_lightning.functional import gae, kl_estimate, kl_shaped_rewards, masked_moments, masked_sum, masked_whiten
from rlhf_lightning.functional.masked import Reduce, identity
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.models.rewarding import ModelScorer, Responses, Scorer, TextScorer
from rlhf_lightning.models.scalar_lm import ScalarLM

Report = Callable[[int, int], None]
"""Told how many of how many parts are done."""


def _silent(done: int, total: int) -> None: ...


class Measurements(NamedTuple):
    """What the four models say of responses.

    Attributes:
        logprobs: under the policy, `[B, R]`, nats.
        ref_logprobs: under the reference, `[B, R]`, nats.
        entropy: of the policy before each token, `[B, R]`, nats.
        values: before each token, `[B, R]`.
        scores: as the reward gives them, a reward model's calibrated, `[B]`.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    scores: Tensor

    @property
    def kl(self) -> Tensor:
        """KL of each response to the reference, its k1 estimate, `[B]`, nats."""
        return kl_estimate(self.logprobs, self.ref_logprobs).sum(dim=1)


def raw_score(scorer: Scorer | None, score: Tensor) -> dict[str, Tensor]:
    """Scores as a reward model gave them, before its calibration, under that name.

    Args:
        scorer: where the scores come from; a function knows no calibration, so there is nothing under the name.
        score: calibrated, any shape; also a mean of scores.
    """
    if not isinstance(scorer, ModelScorer | TextScorer):
        return {}
    calibration = scorer.model.calibration
    return {"raw_score": score * calibration.std + calibration.mean}


@torch.no_grad()
def measure(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    scorer: Scorer,
    value: ScalarLM | TrunkValue | None,
    prompts: PromptBatch,
    generation: Generation,
    texts: list[str],
    temperature: float,
    pieces: list[Tensor],
    report: Report = _silent,
) -> Measurements:
    """Log-probabilities, values and scores of responses.

    Args:
        policy: the model that generated.
        reference: the frozen reference.
        scorer: gives each response its score; a model sees them piece by piece, a function all at once.
        value: the value model; None leaves the values 0.
        prompts: the prompts, B of them.
        generation: their responses. If it brings log-probabilities, those are taken, the entropies are left 0, and the
            policy is not run again; if it brings hidden states, a value head on the policy's trunk reads those.
        texts: the responses as text.
        temperature: the sampling temperature.
        pieces: which responses are measured at once, indices int64; every response is in one of them.
        report: told how many responses are done.
    """
    mask, done = generation.response_mask, 0
    empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    logprobs, ref_logprobs, entropy, values = (empty.clone() for _ in range(4))
    scores = torch.zeros(len(texts), dtype=torch.float32, device=mask.device)
    for index in pieces:
        rows, kept, answered = _joined(prompts, generation, index)
        here = index, slice(answered.shape[1])
        if isinstance(value, TrunkValue) and generation.hidden is not None:
            values[here] = torch.where(answered, value(generation.hidden[here]), 0)
        elif generation.logprobs is None:
            said_before = logprobs_and_values(policy, value, rows, kept, answered, temperature, with_entropy=True)
            logprobs[here], entropy[here], values[here] = said_before
        else:
            values[here] = values_alone(policy, value, rows, kept, answered)
        ref_logprobs[here], _ = response_logprobs(reference, rows, kept, answered, temperature)
        if isinstance(scorer, nn.Module):
            chosen = index.tolist()
            asked, said = [prompts.prompts[i] for i in chosen], [texts[i] for i in chosen]
            written = None if prompts.written is None else [prompts.written[i] for i in chosen]
            known = asked, said, prompts.row_ids[index], written
            scores[index] = scorer(Responses(rows, kept, generation.ended[index], *known)).float()
        done += len(index)
        report(done, len(texts))
    if not isinstance(scorer, nn.Module):
        ids = torch.cat([prompts.prompt_ids, generation.response_ids], dim=1)
        kept = torch.cat([prompts.prompt_mask, mask], dim=1)
        known = prompts.prompts, texts, prompts.row_ids, prompts.written
        scores = scorer(Responses(ids, kept, generation.ended, *known)).float()
    logprobs = logprobs if generation.logprobs is None else generation.logprobs
    return Measurements(logprobs, ref_logprobs, entropy, values, scores)


def _joined(prompts: PromptBatch, generation: Generation, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some sequences, their mask and their response mask, without columns of padding alone."""
    asked, answered = prompts.prompt_mask[index], generation.response_mask[index]
    lengths = torch.stack([asked.sum(dim=1).max(), answered.sum(dim=1).max()])
    prompt, response = lengths.tolist()
    ids = torch.cat([prompts.prompt_ids[index, -prompt:], generation.response_ids[index, :response]], dim=1)
    answered = answered[:, :response]
    return ids, torch.cat([asked[:, -prompt:], answered], dim=1), answered


def shape_scores(scores: Tensor, ended: Tensor, moments: RunningMoments, shaping: ScoreShaping) -> Tensor:
    """Scale, clip and penalise scores, in this order.

    Args:
        scores: as the reward gives them, `[B]`.
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


def experience_metrics(experience: Experience, reduce: Reduce = identity, gamma: float = 1.0) -> dict[str, Tensor]:
    """What is logged of a rollout, over all ranks.

    Args:
        experience: this rank's share.
        reduce: sums a tensor over all ranks.
        gamma: discount per token.

    Returns:
        Scalars. `score`, `score_std`, `reward` (per response, KL penalty included), `kl` and `kl_k3` (per response, in
        nats), `response_length` (tokens) and `eos_rate` are over responses; `entropy` (nats) is over tokens.
        `explained_variance` is `1 - Var(outcomes - values) / Var(outcomes)` over tokens, 0 where outcomes do not vary;
        an outcome is the discounted sum of the rewards that followed. The `returns` that values are trained on would
        flatter: with lambda below 1 they contain the values themselves.
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
    # With lambda 1 and values of 0 the returns are the sums of rewards alone.
    _, outcomes = gae(experience.rewards, torch.zeros_like(experience.values), mask, gamma, gae_lambda=1.0)
    _, _, unexplained = masked_moments(outcomes - experience.values, mask, reduce)
    _, mean_outcome, variance = masked_moments(outcomes, mask, reduce)
    varies = variance > 1e-12 * mean_outcome**2  # more than float32 rounds
    return {
        "score": score,
        "score_std": score_variance.sqrt(),
        "reward": reward / responses,
        "kl": kl / responses,
        "kl_k3": kl_k3 / responses,
        "response_length": tokens / responses,
        "eos_rate": ended / responses,
        "entropy": entropy / tokens,
        "explained_variance": torch.where(varies, 1 - unexplained / variance, 0),
    }
