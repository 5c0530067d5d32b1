"""What must hold before the first update, checked while it runs: cheap and loud."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.online.controllers import RunningMoments
from rlhf_lightning.batches import name_rows
from rlhf_lightning.errors import NonFiniteError, UserError
from rlhf_lightning.forward.capacity import context_length
from rlhf_lightning.forward.numerics import is_float32_exact
from rlhf_lightning.functional import masked_sum
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.scalar_lm import ScalarLM
from rlhf_lightning.models.scorers import ModelScorer, TextScorer
from rlhf_lightning.training import sum_over_ranks

_EXACT, _ROUNDED, _WRONG = 1e-3, 0.05, 1.0
"""Nats per token: what float32 leaves of 0, what lower precision does on average over many tokens, and what no rounding
makes of two evaluations of the same weights."""

_MISMATCH = 0.1
"""Nats per token; engines in bfloat16 stay below 0.02 of a policy in float32."""

_PROBE_TOLERANCE, _PROBE_TOLERANCE_NF4 = 0.1, 1.0
"""Standard deviations; a reward model may be held in a lower precision than it was saved in."""
_PROBE_ROUNDING = 0.03
"""Share of 1 + a raw score that bfloat16 (2^-8, a few layers on) may change, however small the deviation is."""


def check_context(part: Any, max_prompt_length: int | None, max_new_tokens: int) -> None:
    """The longest prompt and response together fit the model.

    Args:
        part: one of the models; what does not read the policy's ids by itself passes.
        max_prompt_length: the data module's limit, in tokens; None if unknown.
        max_new_tokens: the longest response.

    Raises:
        UserError: they do not.
    """
    part = part.model if isinstance(part, ModelScorer) else part
    model = part.model if isinstance(part, ScalarLM) else part
    if not isinstance(model, PreTrainedModel):
        return
    context = context_length(model.config)
    if context and max_prompt_length and max_prompt_length + max_new_tokens > context:
        raise UserError(
            f"max_prompt_length ({max_prompt_length}) + sampling.max_new_tokens ({max_new_tokens}) exceed the context "
            f"of '{model.config.name_or_path}' ({context} tokens); lower --data.max_prompt_length or "
            "--model.sampling.max_new_tokens"
        )


def check_temperature(sampling: Sampling) -> None:
    """Responses are drawn, not taken for the most likely.

    Args:
        sampling: of the rollouts.

    Raises:
        UserError: the temperature is 0.
    """
    if sampling.temperature == 0:
        raise UserError("the policy learns from sampled responses: sampling.temperature must be above 0")


def check_scores(module: pl.LightningModule, scores: Tensor, row_ids: Tensor, examples: Any = None) -> None:
    """All scores of all ranks are numbers.

    Args:
        module: the module that measured them.
        scores: this rank's, `[B]`.
        row_ids: where their prompts stand in the data, `[B]`, int64.
        examples: what they are the scores of; goes with the error.

    Raises:
        NonFiniteError: on every rank, if one of any rank is NaN or infinite.
    """
    finite = torch.isfinite(scores)
    if int(sum_over_ranks(module, (~finite).sum())):
        rows = name_rows(row_ids[~finite])
        step = module.trainer.global_step
        error = NonFiniteError(f"step {step}: a score is not finite ({rows}); look at the reward")
        error.examples = examples
        raise error


def check_rollout_size(given: int, wanted: int, processes: int) -> None:
    """The loaders give as many prompts as the module counts its steps by.

    Args:
        given: prompts in this process's batch.
        wanted: `rollout_batch_size`.
        processes: how many there are.

    Raises:
        UserError: they differ.
    """
    if given * processes != wanted:
        each = f" on each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"the loader gives {given} prompts at once{each} but rollout_batch_size is {wanted}; set both to the same "
            "number"
        )


def check_frozen_dtype(precision: str, frozen_dtype: str) -> None:
    """The type that frozen models are asked to be held in is the one they will have.

    Args:
        precision: the trainer's.
        frozen_dtype: what the module was asked for.

    Raises:
        UserError: the precision casts every model to another type.
    """
    if precision == "bf16-true" and frozen_dtype not in ("auto", "bfloat16"):
        raise UserError(
            f"frozen_dtype {frozen_dtype} cannot be had with trainer.precision bf16-true, which casts every model: set "
            "frozen_dtype to auto, or trainer.precision to bf16-mixed"
        )


def computes_exactly(precision: str, frozen_dtype: str, device_type: str = "cpu") -> bool:
    """Whether two evaluations of the same weights differ by no more than float32 rounds.

    Args:
        precision: the trainer's.
        frozen_dtype: what the reference is held in.
        device_type: where they are computed.
    """
    return precision == "32-true" and frozen_dtype in ("auto", "float32") and is_float32_exact(device_type)


def check_fresh_policy(metrics: dict[str, Any], exact: bool) -> None:
    """Policy and reference are one model, as far as rounding lets this be seen.

    Args:
        metrics: of the first rollout.
        exact: float32 all through.

    Raises:
        AssertionError: they are not.
    """
    kl_per_token = abs(float(metrics["kl"] / metrics["response_length"]))
    _check_same(
        f"policy and reference start from one model, yet their KL per token is {kl_per_token}", kl_per_token, exact
    )


def _check_same(otherwise: str, distance: float, exact: bool) -> None:
    """Raise where a distance that should be 0 is none of rounding's; warn where it might be, over few tokens."""
    if distance > (_EXACT if exact else _WRONG):
        raise AssertionError(otherwise)
    if not exact and distance > _ROUNDED:
        rank_zero_warn(f"{otherwise}; lower precision does that over a few tokens, trainer.precision 32-true would not")


def warn_mismatch(mismatch: dict[str, Tensor], sampling: Sampling) -> None:
    """Say where an engine draws from another distribution than the policy's, so that answers are not the policy's own.

    Args:
        mismatch: what `weigh_draws` says of the first rollout.
        sampling: how responses are drawn; top-k and top-p make another distribution of it anyway.
    """
    kl = float(mismatch.get("mismatch_kl", 0))
    if sampling.top_k == 0 and sampling.top_p == 1 and abs(kl) > _MISMATCH:
        rank_zero_warn(
            f"the engine's distribution is {kl:.2g} nats per token away from the policy's, more than rounding makes of "
            "it; look at the engine's dtype and options, and at train/mismatch_kl"
        )


def check_probe(scorer: Any, nf4: bool = False) -> None:
    """A reward model scores as it did when it was saved.

    Args:
        scorer: where scores come from.
        nf4: the reward model is held in four bits.

    Raises:
        AssertionError: it does not, and no rounding explains it.
    """
    if not isinstance(scorer, ModelScorer | TextScorer):
        return
    error, calibration = scorer.model.probe_error(), scorer.model.calibration
    if error <= (_PROBE_TOLERANCE_NF4 if nf4 else _PROBE_TOLERANCE):
        return
    if error * calibration.std > _PROBE_ROUNDING * (1 + abs(calibration.probe_score)):
        raise AssertionError(
            f"the reward model scores its probe {error:.3f} standard deviations off from when it was saved"
        )
    rank_zero_warn(
        f"the reward model's scores hardly differ (standard deviation {calibration.std:.2g}): rounding alone moves its "
        f"probe by {error:.2f} of them; train it longer, or hold it in the precision it was trained in"
    )


def warn_equal_scores(moments: RunningMoments, scores: Tensor) -> None:
    """Say where a first rollout holds nothing that a policy could learn from its scores.

    Args:
        moments: of the scores of all ranks.
        scores: this rank's, `[B]`.
    """
    if not moments.has_spread:
        rank_zero_warn(
            f"all responses of the first rollout got the same score ({float(scores[0]):.4g}), so none is better than "
            "another; if that stays so, raise rollout_batch_size, or let the reward tell more responses apart"
        )


def check_first_ratio(ratio: Tensor, exact: bool) -> None:
    """Old and new log-probabilities agree before anything has moved, as far as rounding lets this be seen.

    Args:
        ratio: mean probability ratio of the first minibatch.
        exact: float32 all through.

    Raises:
        AssertionError: they differ.
    """
    said = f"before the first update the probability ratio is {float(ratio)}, not 1"
    _check_same(said, abs(float(ratio) - 1), exact)


def check_first_gradient(module: pl.LightningModule, grad_norm: Tensor, to_learn: Tensor, mask: Tensor) -> None:
    """Something is learnt where there is something to learn.

    Args:
        module: the module that made the step; every process must call this.
        grad_norm: of the first minibatch.
        to_learn: of this rank's share of it, 0 at each token that teaches nothing, not negative, `[B, R]`.
        mask: True for response tokens, `[B, R]`, bool.

    Raises:
        AssertionError: the gradient is 0 although advantages or value errors are not.
    """
    if float(sum_over_ranks(module, masked_sum(to_learn, mask))) > 0 and float(grad_norm) == 0:
        raise AssertionError("the first update has no gradient, although there is something to learn from")
