"""The policy and its frozen reference: loading, hidden states, log-probabilities.

Notation: B batch, T padded length, R padded response length, D hidden size.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_lightning.compat import DROPOUTS
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_folders import adapter_base, is_adapter, is_reward_adapter, merge_adapter
from rlhf_lightning.models.dtypes import keep_tables
from rlhf_lightning.models.folders import architectures, check_model_folder, reason_of, say_trusted
from rlhf_lightning.models.quantized import nf4_options, settle_nf4
from rlhf_lightning.models.stored import load_pretrained


def load_causal_lm(
    name_or_path: str | os.PathLike[str], dropout: bool = False, trust_remote_code: bool = False, nf4: bool = False
) -> PreTrainedModel:
    """Load a language model in torch's default dtype.

    A folder that holds a PEFT adapter is loaded on its base model and merged, so the next stage starts from both.

    Args:
        name_or_path: a Hugging Face folder, a PEFT adapter folder, or a hub id.
        dropout: keep the dropout that the model's config asks for; otherwise every dropout module is turned off.
        trust_remote_code: allow the folder to run Python code of its own.
        nf4: hold the linear layers of the backbone in four bits; they cannot be trained.

    Raises:
        UserError: there is no language model at that place.
    """
    name = check_model_folder(name_or_path)
    if classifiers := [each for each in architectures(name) if "SequenceClassification" in each]:
        raise UserError(f"'{name}' is a reward model ({classifiers[0]}); a language model is needed here")
    if is_reward_adapter(name):
        raise UserError(f"'{name}' is the adapter of a reward model; a language model is needed here")
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    kwargs |= nf4_options(name) if nf4 else {}
    model: Any
    if trust_remote_code:
        say_trusted(name)
    try:
        if is_adapter(name):
            base = load_causal_lm(adapter_base(name), dropout=True, trust_remote_code=trust_remote_code)
            model = merge_adapter(base, name, trust_remote_code)
        else:
            model, missing = load_pretrained(AutoModelForCausalLM, name, **kwargs)
            if missing:
                raise ValueError(f"its weights lack {min(missing)}, which would be random")
    except Exception as e:
        raise UserError(f"no language model could be loaded from '{name}': {reason_of(e)}") from e
    settle_nf4(model)
    if not dropout:
        disable_dropout(model)
    train_every_row(model)
    keep_tables(model)
    return model


def train_every_row(model: nn.Module) -> None:
    """Give the embedding of the pad id a gradient, too.

    transformers builds embeddings with `padding_idx=config.pad_token_id`, and such a row learns nothing. Where the pad
    id is the EOS, that is a token that every example ends with; padding itself has no gradient to give.

    Args:
        model: changed in place; its config is not, and what it computes neither.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def disable_dropout(model: nn.Module) -> None:
    """Turn off every dropout of a model, whatever its config calls it.

    Functional dropout reads a number from the module that applies it (`attention_dropout`, `layerdrop`), so those
    attributes are set too. A layer that reads its config on every call (Falcon) gets a config of its own, so that the
    model's config still says what was asked for and is saved so.

    Args:
        model: changed in place.
    """
    without_dropout: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, DROPOUTS):
            module.p = 0.0
        for name in _dropout_numbers(module):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel) or config is None or not _dropout_numbers(config):
            continue
        if id(config) not in without_dropout:
            without_dropout[id(config)] = copy.copy(config)
            for name in _dropout_numbers(config):
                setattr(without_dropout[id(config)], name, 0.0)
        module.config = without_dropout[id(config)]


def _dropout_numbers(owner: Any) -> list[str]:
    return [name for name, value in vars(owner).items() if "drop" in name and isinstance(value, float) and value]


def freeze(model: nn.Module) -> None:
    """Make a model a constant: evaluation mode, no gradients."""
    model.eval().requires_grad_(False)
