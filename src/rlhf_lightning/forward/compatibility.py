"""Whether a model, run as this package runs it, computes what it computes by itself.

We run the backbone and the output layer apart, with positions and padding of our own. For most families that is the
model's own forward. Some read padding on their left (a state that goes from token to token: RWKV; positions counted in
the row: BART), some count positions otherwise (RoBERTa), some do more between backbone and logits (BERT), and some look
ahead (XLNet). Each model is tested on a few dummy tokens.

Notation: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD, run_backbone
from rlhf_lightning.forward.numerics import dummy_tokens, self_test, typical_distance, typical_tolerance
from rlhf_lightning.forward.output_layer import output_logits

_LONG, _SHORT = 5, 3


def ignores_left_padding(model: PreTrainedModel) -> bool:
    """Whether padding on the left changes nothing; padding on the right never does. Six small passes.

    Args:
        model: a language model or a scalar model; every process must test it equally often.

    Raises:
        UserError: the model computes something else than when it is run by itself.
    """
    found = self_test(model, partial(_pads_left_rightly, model))
    if isinstance(found, Exception):
        reason = f"it cannot be run without its output layer ({' '.join(str(found).split())})"
        raise _refusal(model, reason) from found
    return found


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(f"{type(model).__name__} is not supported: {reason}")


def _pads_left_rightly(model: PreTrainedModel) -> bool:
    tokens = dummy_tokens(model, _LONG)
    alone = [_alone(model, tokens[:length]) for length in (_LONG, _SHORT)]  # [T, D] each
    allowed = typical_tolerance(model)
    if typical_distance([alone[0][:_SHORT]], [alone[1]]) > allowed:  # NaN is not judged here
        raise _refusal(model, "what it makes of a token depends on the tokens that follow, so it is not a causal model")
    if typical_distance(_padded(model, tokens, on_the_left=False), alone) > allowed:
        raise _refusal(model, "it counts positions in a way of its own, or does not hide padding")
    if not hasattr(model, HEAD) and typical_distance(*_logits(model, tokens)) > allowed / 20:  # hardly any rounding
        raise _refusal(model, "its logits are more than its output layer makes of its last hidden states")
    return not typical_distance(_padded(model, tokens, on_the_left=True), alone) > allowed


def _alone(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Hidden states of one sequence, `[T, D]`, as the model computes them that is told nothing else."""
    ids = tokens.unsqueeze(0)  # [1, T]
    hidden: Tensor = model.base_model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).last_hidden_state[0]
    return hidden


def _padded(model: PreTrainedModel, tokens: Tensor, on_the_left: bool) -> list[Tensor]:
    """Hidden states of all tokens and of the first few, in one batch."""
    rows = [tokens, tokens[:_SHORT]]
    places = [slice(_LONG - len(row), _LONG) if on_the_left else slice(len(row)) for row in rows]
    ids, mask = tokens.new_zeros(2, _LONG), tokens.new_zeros(2, _LONG, dtype=torch.bool)
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[number, place], mask[number, place] = row, True
    hidden = run_backbone(model, ids, mask).last_hidden_state  # [2, T, D]
    return [hidden[number, place] for number, place in enumerate(places)]


def _logits(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Ours and the model's own."""
    ids = tokens.unsqueeze(0)  # [1, T]
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]  # [T, V]
    return [output_logits(model, _alone(model, tokens))], [own]
