"""The policy and its frozen reference: loading, hidden states, log-probabilities.

Notation: B batch, T padded length, R padded response length, D hidden size.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import position_ids, run_backbone
from rlhf_lightning.forward.capacity import explained_lookups
from rlhf_lightning.forward.compatibility import takes_left_padding
from rlhf_lightning.forward.output_layer import token_logprobs_at
from rlhf_lightning.forward.unpadded import applies, unpadded_hidden_states
from rlhf_lightning.models.adapters import adapter_base, is_adapter, is_reward_adapter, merge_adapter
from rlhf_lightning.models.dtypes import keep_tables
from rlhf_lightning.models.folders import LOADING_ERRORS, check_model_folder, read_config
from rlhf_lightning.models.quantized import nf4_options, settle_nf4


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
    architectures = read_config(name).get("architectures") or []
    if any("SequenceClassification" in a for a in architectures):
        raise UserError(f"'{name}' is a reward model ({architectures[0]}); a language model is needed here")
    if is_reward_adapter(name):
        raise UserError(f"'{name}' is the adapter of a reward model; a language model is needed here")
    kwargs: dict[str, Any] = {"dtype": torch.get_default_dtype(), "trust_remote_code": trust_remote_code}
    kwargs |= nf4_options(name) if nf4 else {}
    model: Any
    try:
        if is_adapter(name):
            model = merge_adapter(load_causal_lm(adapter_base(name), True, trust_remote_code), name, trust_remote_code)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
            model, info = loaded
            if info["missing_keys"]:
                raise ValueError(f"its weights lack {min(info['missing_keys'])}, which would be random")
    except LOADING_ERRORS as e:
        raise UserError(f"no language model could be loaded from '{name}': {str(e).strip().splitlines()[0]}") from e
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
    quiet: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _dropout_numbers(module):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel) or config is None or not _dropout_numbers(config):
            continue
        if id(config) not in quiet:
            quiet[id(config)] = copy.copy(config)
            for name in _dropout_numbers(config):
                setattr(quiet[id(config)], name, 0.0)
        module.config = quiet[id(config)]


def _dropout_numbers(owner: Any) -> list[str]:
    return [name for name, value in vars(owner).items() if "drop" in name and isinstance(value, float) and value]


def freeze(model: nn.Module) -> None:
    """Make a model a constant: evaluation mode, no gradients."""
    model.eval().requires_grad_(False)


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None = None
) -> Tensor:
    """Last hidden states: everything before the output layer.

    Args:
        model: a language model or a scalar model.
        input_ids: `[B, T]`, int64.
        attention_mask: True for real tokens, `[B, T]`, bool, padded on either side.
        packed_positions: for packed rows, the place of each token in its own example, `[B, T]`, int64, 0 on padding;
            no example sees another (on models that pass `packed.check_packing`).

    Returns:
        `[B, T, D]`; anything finite on padding.
    """
    pads_left = takes_left_padding(model)
    with explained_lookups(model, input_ids, attention_mask):
        return _hidden_states(model, input_ids, attention_mask, packed_positions, pads_left)


def _hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None, pads_left: bool
) -> Tensor:
    hidden = None
    if applies(model, input_ids.device):
        positions, lengths = packed_positions, None
        if positions is None:
            positions = position_ids(attention_mask)
        else:
            starts = (positions[attention_mask] == 0).nonzero().squeeze(1)
            ends = torch.cat([starts[1:], attention_mask.sum().reshape(1)])
            lengths = (ends - starts).tolist()
        hidden = unpadded_hidden_states(model, input_ids, attention_mask, positions, lengths)
    if hidden is not None:
        return hidden
    if not pads_left and packed_positions is None:
        return _hidden_states_from_the_left(model, input_ids, attention_mask)
    return padded_hidden_states(model, input_ids, attention_mask, packed_positions)


def _hidden_states_from_the_left(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """As `hidden_states`, for models that read what stands on their left: all padding goes to the right."""
    order = attention_mask.long().argsort(dim=1, descending=True, stable=True)
    hidden = padded_hidden_states(model, input_ids.gather(1, order), attention_mask.gather(1, order))
    return hidden.gather(1, order.argsort(dim=1).unsqueeze(2).expand_as(hidden))


def padded_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, packed_positions: Tensor | None = None
) -> Tensor:
    """As `hidden_states`, the padding computed too."""
    if packed_positions is None:
        return run_backbone(model, input_ids, attention_mask).last_hidden_state
    # transformers reads the borders from the positions, but only where it is given no mask. A pad at position 0 is an
    # example of its own, which nobody else sees.
    output = model.base_model(input_ids=input_ids, attention_mask=None, position_ids=packed_positions, use_cache=False)
    return output.last_hidden_state


def response_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
    """Hidden states from which the response tokens are predicted.

    Response token r sits at position P + r and is predicted from P + r - 1.

    Args:
        model: a language model or a scalar model.
        input_ids: prompts padded on the left, then responses padded on the right, `[B, P + R]`.
        attention_mask: `[B, P + R]`, bool.
        response_length: R.

    Returns:
        `[B, R, D]`.
    """
    return hidden_states(model, input_ids, attention_mask)[:, -response_length - 1 : -1]


def response_logprobs(
    model: PreTrainedModel,
    sequences: Tensor,
    sequence_mask: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token, `log pi(x[P+r] | x[<P+r])`.

    Args:
        model: a language model.
        sequences: prompts padded on the left, then responses padded on the right, `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        response_mask: True for response tokens, `[B, R]`, bool.
        temperature: the sampling temperature.
        with_entropy: also compute the entropy of each prediction.

    Returns:
        Log-probabilities and entropies in nats, both `[B, R]`, float32, 0 after the last token; the entropies are all 0
        unless asked for.
    """
    hidden = response_hidden(model, sequences, sequence_mask, response_mask.shape[1])
    return logprobs_from_hidden(model, hidden, sequences, response_mask, temperature, with_entropy)


def logprobs_from_hidden(
    model: PreTrainedModel,
    hidden: Tensor,
    sequences: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `response_logprobs`, where the hidden states are there already.

    Args:
        model: a language model; its output layer is used.
        hidden: from `response_hidden`, `[B, R, D]`.
        sequences: prompts and responses, `[B, P + R]`, int64.
        response_mask: True for response tokens, `[B, R]`, bool.
        temperature: the sampling temperature.
        with_entropy: also compute the entropy of each prediction.
    """
    # Only real response positions meet the output matrix, a chunk at a time.
    token_ids = sequences[:, -response_mask.shape[1] :][response_mask]
    logprobs, entropies = token_logprobs_at(model, hidden[response_mask], token_ids, temperature, with_entropy)
    empty = torch.zeros(response_mask.shape, dtype=torch.float32, device=sequences.device)
    spread = empty if entropies is None else empty.masked_scatter(response_mask, entropies.float())
    return empty.masked_scatter(response_mask, logprobs.float()), spread
