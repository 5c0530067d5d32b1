"""The parts of a rollout: what the models say of answers, scores made ready, and what is logged.

Notation: B batch, P padded prompt length, R padded response length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.online.controllers import RunningMoments
from rlhf_lightning.algorithms.online.experience import Experience, Measurements
from rlhf_lightning.algorithms.online.models import TrunkValue, logprobs_and_values, values_alone
from rlhf_lightning.algorithms.online.settings import ScoreShaping
from rlhf_lightning.algorithms.online.sharing import Piece
from rlhf_lightning.batches import PromptBatch, Sources, log_names
from rlhf_lightning.forward.casts import cast_once
from rlhf_lightning.forward.common_trunk import common_trunk, have_common_trunk
from rlhf_lightning.forward.hidden import response_logprobs
from rlhf_lightning.forward.shared_prompts import SharedPrompts
from rlhf_lightning.functional import gae, kl_estimate, masked_moments, masked_sum, truncated_importance
from rlhf_lightning.functional.masked import Reduce, identity
from rlhf_lightning.generation.engine import Generation
from rlhf_lightning.host import alike, on_host
from rlhf_lightning.models.scalar_lm import ScalarLM
from rlhf_lightning.models.scorers import ModelScorer, Responses, Scorer, TextScorer, scores_tokens, token_scores

Report = Callable[[int, int], None]
"""Told how many of how many parts are done."""


def raw_score(scorer: Scorer | None, score: Tensor) -> dict[str, Tensor]:
    """Scores as a reward model gave them, before its calibration, under that name.

    Args:
        scorer: where the scores come from; a function knows no calibration, so there is nothing under the name.
        score: calibrated, any shape; also a mean of scores.
    """
    if not isinstance(scorer, ModelScorer | TextScorer):
        return {}
    if isinstance(scorer, ModelScorer) and scorer.along is not None and scorer.along.kind == "score":
        return {}  # a sum over tokens has no such scale
    calibration = scorer.model.calibration
    return {"raw_score": score * calibration.std + calibration.mean}


class _Shown(NamedTuple):
    """A piece as the models are shown it.

    Attributes:
        which: of the responses, `[b]`, int64.
        joined: sequences, their mask, both `[b, p + r]`, and their response mask, `[b, r]`.
        rows: how they go through a model; None for each by itself.
    """

    which: Tensor
    joined: tuple[Tensor, Tensor, Tensor]
    rows: SharedPrompts | None

    @classmethod
    def of(cls, piece: Piece, prompts: PromptBatch, generation: Generation) -> _Shown:
        joined = _joined(prompts, generation, piece.rows)
        return cls(piece.rows, joined, piece.laid_out(*joined))

    @property
    def here(self) -> tuple[Tensor, slice]:
        """Their places among the tokens of all responses."""
        return self.which, slice(self.joined[2].shape[1])


@torch.no_grad()
def measure(
    prompts: PromptBatch,
    generation: Generation,
    texts: list[str],
    *,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    scorer: Scorer,
    value: ScalarLM | TrunkValue | None,
    temperature: float,
    pieces: Sequence[Piece],
    report: Report | None = None,
    others: Mapping[str, Scorer] = MappingProxyType({}),
) -> Measurements:
    """Log-probabilities, values and scores of responses.

    Args:
        prompts: the prompts, B of them.
        generation: their responses. If it brings log-probabilities, those are taken, the entropies are left 0, and the
            policy is not run again; if it brings hidden states, a value head on the policy's trunk reads those.
        texts: the responses as text.
        policy: the model that generated.
        reference: the frozen reference.
        scorer: gives each response its score, or each token; a model sees them piece by piece, a function all at once.
        value: the value model; None leaves the values 0.
        temperature: the sampling temperature.
        pieces: which responses are measured at once; every response is in one of them.
        report: told how many responses are done, counted for each model.
        others: other rewards, by name, which give each response a score of their own.
    """
    mask = generation.response_mask  # [B, R]
    logprobs, ref_logprobs, entropy, values = torch.zeros((4, *mask.shape), dtype=torch.float32, device=mask.device)
    scorers = [scorer, *others.values()]
    scores = torch.zeros((len(scorers), len(texts)), dtype=torch.float32, device=mask.device)
    dense = {number: torch.zeros_like(logprobs) for number, each in enumerate(scorers) if scores_tokens(each)}

    def policy_and_value(shown: _Shown) -> None:
        said = _policy_and_value(policy, value, generation, shown, temperature)
        logprobs[shown.here], entropy[shown.here], values[shown.here] = said

    def of_reference(shown: _Shown) -> None:
        ref_logprobs[shown.here], _ = response_logprobs(reference, *shown.joined, temperature, rows=shown.rows)

    def of_reward(number: int, shown: _Shown) -> None:
        responses = _responses(prompts, generation, texts, *shown.joined[:2], shown.which)
        if number in dense:
            dense[number][shown.here] = token_scores(scorers[number], responses, shown.joined[2])
        else:
            scores[number, shown.which] = scorers[number](responses._replace(shared=shown.rows)).float()

    asked: list[_Asked] = [([policy] if value is None else [policy, value], policy_and_value)]
    asked.append(([reference], of_reference))
    for number, each in enumerate(scorers):
        asked += [([each], partial(of_reward, number))] if isinstance(each, nn.Module) else []
    pairs = [] if generation.logprobs is not None else [(policy, reference)]
    if isinstance(value, ScalarLM) and isinstance(scorer, ModelScorer):
        pairs.append((value.model, scorer.model.model))
    _ask(asked, pairs, [_Shown.of(piece, prompts, generation) for piece in pieces], report)
    functions = [(number, each) for number, each in enumerate(scorers) if not isinstance(each, nn.Module)]
    if functions:
        every = torch.arange(len(texts), device=mask.device)
        ids = torch.cat([prompts.prompt_ids, generation.response_ids], dim=1)
        kept = torch.cat([prompts.prompt_mask, mask], dim=1)
        everything = _responses(prompts, generation, texts, ids, kept, every)
    for number, each in functions:
        if number in dense:
            dense[number] = token_scores(each, everything, mask)
        else:
            scores[number] = each(everything).float()
    for number, each_token in dense.items():
        scores[number] = each_token.sum(dim=1)
    main, *rest = scores
    by_name = dict(zip(others, rest, strict=True))
    along = {name: dense[number] for number, name in enumerate(others, 1) if number in dense}
    ones = torch.ones_like(logprobs)
    return Measurements(logprobs, ref_logprobs, entropy, values, main, ones, by_name, dense.get(0), along)


_Asked = tuple[list[nn.Module], Callable[[_Shown], None]]
"""Models, and what is asked of them of a piece."""


def _ask(
    asked: list[_Asked],
    pairs: list[tuple[PreTrainedModel, PreTrainedModel]],
    pieces: list[_Shown],
    report: Report | None,
) -> None:
    """Ask models of all pieces.

    One after the other, so that weights are cast once, and the casts of one model are held at a time; but together
    where the second of a pair takes over what the first has said of a piece.
    """
    pairs = [pair for pair in pairs if have_common_trunk(*pair)]
    if pairs:
        questions = [ask for _, ask in asked]

        def ask_everything(shown: _Shown) -> None:
            for ask in questions:
                ask(shown)

        asked = [([model for models, _ in asked for model in models], ask_everything)]
    total, done = len(asked) * sum(len(shown.which) for shown in pieces), 0
    with ExitStack() as stack:
        for first, second in pairs:
            stack.enter_context(common_trunk(first, second))
        for models, ask in asked:
            with cast_once(*models):
                for shown in pieces:
                    ask(shown)
                    done += len(shown.which)
                    if report is not None:
                        report(done, total)


def weigh_draws(
    measured: Measurements,
    generation: Generation,
    cap: float | None,
    per_response: bool = False,
    reduce: Reduce = identity,
) -> tuple[Measurements, dict[str, Tensor]]:
    """Give each token its weight, where an engine has drawn it from a distribution of its own.

    Args:
        measured: what the models say of the responses; the policy was measured itself.
        generation: the responses.
        cap: the largest weight; None leaves all of them 1.
        per_response: a response is one action, with one weight.
        reduce: sums a tensor over all ranks.

    Returns:
        The measurements with their weights, and what is logged of them, over all response tokens of all ranks:
        `mismatch_kl`, the KL of the engine's distribution to the policy's (k1 estimate, nats per token),
        `importance`, the mean weight, and `importance_capped`, the share of weights at the cap. Both are as they were,
        and nothing is logged, where the engine drew from the policy itself.
    """
    if generation.sampler_logprobs is None:
        return measured, {}
    mask, drawn = generation.response_mask, generation.sampler_logprobs
    if cap is not None:
        weights = truncated_importance(measured.logprobs, drawn, mask, cap, per_response)
        measured = measured._replace(importance=weights)
    weights = measured.importance
    capped = weights >= cap if cap is not None else torch.zeros_like(mask)
    parts = masked_sum(drawn - measured.logprobs, mask), masked_sum(weights, mask), (capped & mask).sum(), mask.sum()
    kl, weight, at_cap, tokens = reduce(torch.stack([part.float() for part in parts]))
    return measured, {
        "mismatch_kl": kl / tokens,
        "importance": weight / tokens,
        "importance_capped": at_cap / tokens,
    }


def _policy_and_value(
    policy: PreTrainedModel,
    value: ScalarLM | TrunkValue | None,
    generation: Generation,
    shown: _Shown,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and values of responses, `[b, r]`; what the engine kept is not run."""
    if generation.logprobs is None:
        return logprobs_and_values(policy, value, *shown.joined, temperature, with_entropy=True, rows=shown.rows)
    logprobs = generation.logprobs[shown.here]
    if isinstance(value, TrunkValue) and generation.hidden is not None:
        values = torch.where(shown.joined[2], value(generation.hidden[shown.here]), 0)
    else:
        values = values_alone(policy, value, *shown.joined, shown.rows)
    return logprobs, torch.zeros_like(logprobs), values


def _responses(
    prompts: PromptBatch, generation: Generation, texts: list[str], ids: Tensor, kept: Tensor, index: Tensor
) -> Responses:
    """What a scorer is shown of the responses at `index`, int64."""
    chosen = on_host(index)[0].tolist()
    return Responses(
        sequences=ids,
        sequence_mask=kept,
        ended=generation.ended[index],
        prompts=[prompts.prompts[i] for i in chosen],
        responses=[texts[i] for i in chosen],
        row_ids=prompts.row_ids[index],
        written=None if prompts.written is None else [prompts.written[i] for i in chosen],
    )


def _joined(prompts: PromptBatch, generation: Generation, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Some sequences, their mask and their response mask, without columns of padding alone."""
    asked, answered, chosen = on_host(prompts.prompt_mask, generation.response_mask, index)
    prompt, response = (int(mask[chosen].sum(dim=1).max()) for mask in (asked, answered))
    ids = torch.cat([prompts.prompt_ids[index, -prompt:], generation.response_ids[index, :response]], dim=1)
    first = alike(lambda mask, index: mask[index, -prompt:], prompts.prompt_mask, index)
    rest = alike(lambda mask, index: mask[index, :response], generation.response_mask, index)
    return ids, alike(lambda *masks: torch.cat(masks, dim=1), first, rest), rest


def shape_scores(
    scores: Tensor, ended: Tensor, lengths: Tensor, moments: RunningMoments, shaping: ScoreShaping, max_new_tokens: int
) -> Tensor:
    """Scale, clip and penalise scores, in the order of `ScoreShaping`.

    Args:
        scores: as the reward gives them, `[B]`.
        ended: True where the response ended by itself, `[B]`, bool.
        lengths: tokens of each response, `[B]`.
        moments: running moments, these scores included.
        shaping: what is to be done.
        max_new_tokens: limit of a response.

    Returns:
        `[B]`.

    Example:
        >>> ended, lengths = torch.tensor([True, False]), torch.tensor([2, 8])
        >>> shaping = ScoreShaping(scaling=False, clip=5.0, missing_eos_penalty=1.0)
        >>> shape_scores(torch.tensor([9.0, 0.5]), ended, lengths, RunningMoments(), shaping, 8)
        tensor([ 5.0000, -0.5000])
    """
    if shaping.scaling:
        scores = moments.scale(scores)
    if shaping.clip is not None:
        scores = scores.clamp(-shaping.clip, shaping.clip)
    if shaping.missing_eos_score is not None:
        scores = torch.where(ended, scores, shaping.missing_eos_score)
    scores = scores - shaping.missing_eos_penalty * (~ended)
    if (buffer := shaping.overlong_buffer) is not None:
        into = (lengths - (max_new_tokens - buffer)) / buffer  # [B]
        scores = scores - shaping.overlong_penalty * into.clamp(0, 1)
    return scores


def experience_metrics(experience: Experience, reduce: Reduce = identity) -> dict[str, Tensor]:
    """What is logged of a rollout, over all ranks.

    Args:
        experience: this rank's share.
        reduce: sums a tensor over all ranks.

    Returns:
        Scalars. `score`, `score_std`, `reward` (per response, KL penalty included), `kl` and `kl_k3` (per response, in
        nats), `response_length` (tokens) and `eos_rate` are over responses; `entropy` (nats) is over tokens.
    """
    mask = experience.response_mask
    sums = torch.stack(
        [
            torch.full((), len(mask), dtype=torch.float32, device=mask.device),
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
    return {
        "score": score,
        "score_std": score_variance.sqrt(),
        "reward": reward / responses,
        "kl": kl / responses,
        "kl_k3": kl_k3 / responses,
        "response_length": tokens / responses,
        "eos_rate": ended / responses,
        "entropy": entropy / tokens,
    }


def metrics_by_source(sources: Sources, scores: Tensor, kl: Tensor, reduce: Reduce = identity) -> dict[str, Tensor]:
    """Mean score and KL of the responses to the prompts of each source, over all ranks.

    Args:
        sources: of the prompts, B of them.
        scores: `[B]`.
        kl: of each response to the reference, `[B]`, nats.
        reduce: sums a tensor over all ranks.

    Returns:
        `score_from_NAME` and `kl_from_NAME`, scalars; nothing of a source without a prompt among them. What cannot
        stand in a name is `_` there.
    """
    mine = sources.numbers == torch.arange(len(sources.names), device=scores.device).unsqueeze(1)  # [S, B]
    sums = torch.stack([(mine * each).sum(dim=1) for each in (torch.ones_like(scores), scores, kl)])  # [3, S]
    counts, score, total_kl = reduce(sums.double())
    (known,) = on_host(counts)
    found: dict[str, Tensor] = {}
    for number, name in enumerate(log_names(sources.names)):
        if known[number]:
            found[f"score_from_{name}"] = (score[number] / counts[number]).float()
            found[f"kl_from_{name}"] = (total_kl[number] / counts[number]).float()
    return found


def explained_variance(experience: Experience, reduce: Reduce = identity, gamma: float = 1.0) -> Tensor:
    """How well the values foretold what came: `1 - Var(outcomes - values) / Var(outcomes)` over tokens, a scalar.

    An outcome is the discounted sum of the rewards that followed. The `returns` that values are trained on would
    flatter: with lambda below 1 they contain the values themselves. 0 where outcomes do not vary.

    Args:
        experience: this rank's share.
        reduce: sums a tensor over all ranks.
        gamma: discount per token.
    """
    mask = experience.response_mask
    # With lambda 1 and values of 0 the returns are the sums of rewards alone.
    _, outcomes = gae(experience.rewards, torch.zeros_like(experience.values), mask, gamma, gae_lambda=1.0)
    _, _, unexplained = masked_moments(outcomes - experience.values, mask, reduce)
    _, mean_outcome, variance = masked_moments(outcomes, mask, reduce)
    varies = variance > 1e-12 * mean_outcome**2  # more than float32 rounds
    return torch.where(varies, 1 - unexplained / variance, 0)
