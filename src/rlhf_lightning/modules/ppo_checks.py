"""What must hold before PPO's first update, checked while it runs: cheap and loud."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from rlhf_lightning.errors import NonFiniteError, UserError
from rlhf_lightning.models.rewarding import ModelScorer, TextScorer
from rlhf_lightning.models.sampling import Sampling
from rlhf_lightning.models.trials import is_float32_exact
from rlhf_lightning.modules.common import name_rows
from rlhf_lightning.strategies import sum_over_ranks

_PROBE_TOLERANCE, _PROBE_TOLERANCE_NF4 = 0.1, 1.0
"""Standard deviations; a reward model may be held in a lower precision than it was saved in."""


def check_context(config: Any, max_prompt_length: int | None, max_new_tokens: int) -> None:
    """The longest prompt and response together fit the model.

    Args:
        config: the policy's.
        max_prompt_length: the data module's limit, in tokens; None if unknown.
        max_new_tokens: the longest response.

    Raises:
        UserError: they do not.
    """
    context = getattr(config, "max_position_embeddings", None)
    if context and max_prompt_length and max_prompt_length + max_new_tokens > context:
        raise UserError(
            f"max_prompt_length ({max_prompt_length}) + sampling.max_new_tokens ({max_new_tokens}) exceed the context "
            f"of '{config.name_or_path}' ({context} tokens)"
        )


def check_temperature(sampling: Sampling) -> None:
    """Responses are drawn, not taken for the most likely.

    Args:
        sampling: of the rollouts.

    Raises:
        UserError: the temperature is 0.
    """
    if sampling.temperature == 0:
        raise UserError("PPO learns from sampled responses: sampling.temperature must be above 0")


def check_scores(module: pl.LightningModule, scores: Tensor, row_ids: Tensor) -> None:
    """All scores of all ranks are numbers.

    Args:
        module: the module that measured them.
        scores: this rank's, `[B]`.
        row_ids: where their prompts stand in the data, `[B]`, int64.

    Raises:
        NonFiniteError: on every rank, if one of any rank is NaN or infinite.
    """
    finite = torch.isfinite(scores)
    if int(sum_over_ranks(module, (~finite).sum())):
        rows = name_rows(row_ids[~finite])
        raise NonFiniteError(f"step {module.trainer.global_step}: a score is not finite ({rows}); look at the reward")


def check_rollout_size(given: int, wanted: int) -> None:
    """The loader gives as many prompts as the module counts its steps by.

    Args:
        given: prompts in the loader's batch.
        wanted: `rollout_batch_size`.

    Raises:
        UserError: they differ.
    """
    if given != wanted:
        raise UserError(
            f"the loader gives {given} prompts at once but rollout_batch_size is {wanted}; set both to the same number"
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


def fresh_tolerance(precision: str, frozen_dtype: str, device_type: str = "cpu") -> float:
    """How far two evaluations of the same weights may lie apart, in nats per token.

    Args:
        precision: the trainer's.
        frozen_dtype: what the reference is held in.
        device_type: where they are computed.
    """
    exact = precision == "32-true" and frozen_dtype in ("auto", "float32") and is_float32_exact(device_type)
    return 1e-3 if exact else 0.05


def check_fresh_models(scorer: Any, metrics: dict[str, Any], tolerance: float, nf4: bool = False) -> None:
    """Policy and reference are one model, and the reward model scores as it did when it was saved.

    Args:
        scorer: where scores come from.
        metrics: of the first rollout.
        tolerance: nats per token.
        nf4: the reward model is held in four bits.

    Raises:
        AssertionError: one of the two does not hold.
    """
    kl_per_token = abs(float(metrics["kl"] / metrics["response_length"]))
    if kl_per_token > tolerance:
        raise AssertionError(f"policy and reference start from one model, yet their KL per token is {kl_per_token}")
    probe_tolerance = _PROBE_TOLERANCE_NF4 if nf4 else _PROBE_TOLERANCE
    if isinstance(scorer, ModelScorer | TextScorer) and (error := scorer.model.probe_error()) > probe_tolerance:
        raise AssertionError(
            f"the reward model scores its probe {error:.3f} standard deviations off from when it was saved"
        )


def check_first_ratio(ratio: Tensor, tolerance: float) -> None:
    """Old and new log-probabilities agree before anything has moved.

    Args:
        ratio: mean probability ratio of the first minibatch.
        tolerance: nats per token.

    Raises:
        AssertionError: they differ.
    """
    if abs(float(ratio) - 1) > tolerance:
        raise AssertionError(f"before the first update the probability ratio is {float(ratio)}, not 1")


def check_first_gradient(grad_norm: Tensor) -> None:
    """Something is learnt.

    Args:
        grad_norm: of the first minibatch.

    Raises:
        AssertionError: the gradient is 0.
    """
    if float(grad_norm) == 0:
        raise AssertionError("the first update has no gradient: nothing would be learnt")
