"""Several models in the memory of one: module trees of their own that hold the same frozen weights.

A reference that differs from the policy by the policy's adapters alone needs no weights of its own, and neither does a
reward model that differs by an adapter and a head. Each gets its own tree of modules, so nothing is switched on and off
between them, but the trees hold the very same frozen parameters. What moves a parameter (another device, another type)
moves it for all.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.causal_lm import disable_dropout, freeze, load_causal_lm
from rlhf_lightning.models.folders import same_model
from rlhf_lightning.models.scalar_lm import Calibration, ScalarLM
from rlhf_lightning.models.tokenizer import load_tokenizer, same_tokenizer
from rlhf_lightning.training.sharded import (
    dtype_ahead,
    fill_with_zeros,
    is_sharded,
    widen_later,
    widens_later,
    will_be_sharded,
)

ModelT = TypeVar("ModelT", bound=nn.Module)


def frozen_twin(model: ModelT) -> ModelT:
    """The model as it is now, for good.

    Args:
        model: the weights that are frozen are shared with the twin, those that will be trained are copied.

    Returns:
        A frozen model in evaluation mode.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.bias.requires_grad_(False)
        >>> twin = frozen_twin(layer)
        >>> twin.bias is layer.bias, twin.weight is layer.weight
        (True, False)
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, shared)
    for weight, copied in zip(model.parameters(), twin.parameters(), strict=True):
        if widens_later(weight):
            widen_later(copied)
    freeze(twin)
    return twin


def copied_or_shared(model: Any) -> Any:
    """The frozen twin, or None where weights are sharded that would have to be copied, or will be.

    Loaded once more they cost less: from a file each process reads the part that it keeps.

    Args:
        model: as for `frozen_twin`.
    """
    trained = [p.requires_grad for p in model.parameters()]
    if (is_sharded(model) and any(trained)) or (will_be_sharded() and all(trained)):
        return None
    return frozen_twin(model)


def load_reference(
    policy: PreTrainedModel,
    name: str,
    reference: str | None,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    nf4: bool = False,
) -> PreTrainedModel:
    """The frozen model that a policy is held near.

    Args:
        policy: loaded from `name`, its adapters not yet added.
        name: folder or hub id.
        reference: folder or hub id of the reference; None for the policy as it is now, sharing what is frozen.
        tokenizer: the policy's.
        trust_remote_code: allow a folder to run Python code of its own.
        nf4: hold the linear layers of a reference of its own in four bits.

    Raises:
        UserError: the reference is missing, or reads other tokens than the policy.
    """
    if reference is None or same_model(reference, name):
        model = copied_or_shared(policy) or load_causal_lm(name, trust_remote_code=trust_remote_code)
    elif same_tokenizer(tokenizer, load_tokenizer(reference, trust_remote_code)):
        model = load_causal_lm(reference, trust_remote_code=trust_remote_code, nf4=nf4)
    else:
        raise UserError(f"reference '{reference}' reads other tokens than '{name}'; name one that shares them")
    freeze(model)
    return model


def scalar_beside(model: PreTrainedModel) -> ScalarLM:
    """A scalar model on the frozen backbone of a language model; its head says 0.

    Args:
        model: a language model whose whole backbone is frozen.

    Returns:
        A model that shares the backbone's weights and trains its head.

    Raises:
        UserError: the family has no classifier with a linear head on the same backbone in transformers.
    """
    with torch.device("meta"):
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        try:
            classifier: Any = AutoModelForSequenceClassification.from_config(config)
        except ValueError as e:
            raise UserError(f"{type(model).__name__} has no classifier in transformers: {e}") from e
    head = getattr(classifier, "score", None)
    if type(classifier.base_model) is not type(model.base_model) or not isinstance(head, nn.Linear):
        raise UserError(f"{type(classifier).__name__} has no linear head on the backbone of {type(model).__name__}")
    setattr(classifier, classifier.base_model_prefix, frozen_twin(model.base_model))
    backbone_dtype = dtype_ahead(next(model.base_model.parameters()))
    classifier.score = zero_head(head.in_features).to(backbone_dtype)
    classifier.eval()
    disable_dropout(classifier)
    scalar = ScalarLM(classifier)
    scalar.calibration = Calibration()
    return scalar


def zero_head(hidden_size: int) -> nn.Linear:
    """A scalar head without bias that says 0 of everything.

    Args:
        hidden_size: D.
    """
    head = nn.Linear(hidden_size, 1, bias=False)
    fill_with_zeros(head.weight)
    return head
