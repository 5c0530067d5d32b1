"""Blocks that two models have in common, run once for both.

Where the last block alone is trained (`last_layer`), policy and reference say the same of a sequence before that block,
and so do value and reward model. Run one after the other on the same sequences, the second takes over what the first
has come to.

Notation: B batch, T padded length, N tokens of whatever goes through a block, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from rlhf_lightning.compat import CALL
from rlhf_lightning.forward.backbone import evaluation_mode, run_backbone, unusual_layers
from rlhf_lightning.forward.numerics import dummy_tokens, relative_distance, self_test, tolerance
from rlhf_lightning.training.sharded import blocks_of, is_sharded

_TOKENS = 6  # of the self test
_same: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[PreTrainedModel, bool]] = WeakKeyDictionary()


class _Memory:
    """What the common blocks were given and said when the first model was run."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.said: Any = None
        self.is_told = False

    def note_given(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given, self.said = [tensor.clone() for tensor in _given(args, kwargs)], None

    def note_said(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.said = tree_map_only(Tensor, torch.clone, output)  # whoever goes on may write over it

    def tell(self, forward: Callable[..., Any], is_first: bool, *args: Any, **kwargs: Any) -> Any:
        """In the place of a block's forward: what the last common block said, where all was given the same."""
        if is_first:
            given = _given(args, kwargs)
            same = self.said is not None and len(given) == len(self.given)
            self.is_told = same and all(map(torch.equal, given, self.given))
        return self.said if self.is_told else forward(*args, **kwargs)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Hidden states, and their positions, by which sequences in one row are told apart."""
    given = [args[0] if args else kwargs["hidden_states"], kwargs.get("position_ids")]
    return [tensor for tensor in given if isinstance(tensor, Tensor)]


@contextmanager
def common_trunk(first: PreTrainedModel, second: PreTrainedModel) -> Iterator[None]:
    """Let the second model take over from the first, for the length of a `with` block, without gradients.

    Wherever the first block of the second is given what that of the first was given last, all blocks that are common
    are left out; elsewhere it runs as ever.

    Args:
        first: run on some sequences first, with the same mask.
        second: run on the same ones next; `have_common_trunk` has said yes.
    """
    blocks, memory = _common_blocks(first, second), _Memory()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for handle in (
            blocks[0][0].register_forward_pre_hook(memory.note_given, with_kwargs=True),
            blocks[-1][0].register_forward_hook(memory.note_said),
        ):
            stack.callback(handle.remove)
        for place, (_, block) in enumerate(blocks):
            stack.callback(partial(vars(block).pop, "forward"))
            vars(block)["forward"] = partial(memory.tell, block.forward, place == 0)
        yield


def have_common_trunk(first: nn.Module | None, second: nn.Module | None) -> bool:
    """Whether two models begin with the same frozen blocks, and the second may leave them out; tested once.

    Args:
        first: any module; one that is no Hugging Face model has none.
        second: likewise.
    """
    if not isinstance(first, PreTrainedModel) or not isinstance(second, PreTrainedModel):
        return False
    if not _common_blocks(first, second):
        return False
    known = _same.setdefault(first, WeakKeyDictionary())
    if second not in known:
        known[second] = self_test(second, partial(_says_the_same, first, second)) is True
    return known[second]


def _common_blocks(first: PreTrainedModel, second: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """The first blocks of both, as long as they hold the very same frozen weights."""
    found: list[tuple[nn.Module, nn.Module]] = []
    if first is second or is_sharded(first) or is_sharded(second) or unusual_layers(second):
        return found
    for mine, other in zip(blocks_of(first), blocks_of(second), strict=False):
        weights, others = dict(mine.named_parameters()), dict(other.named_parameters())
        if weights.keys() != others.keys() or "forward" in vars(other) or CALL in {**vars(mine), **vars(other)}:
            break  # what is compiled has no room for it
        if any(weight.requires_grad or weight is not others[name] for name, weight in weights.items()):
            break
        found.append((mine, other))
    return found


def _says_the_same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Whether hidden states of a few dummy tokens are those of the second model by itself."""
    ids = dummy_tokens(second, 2 * _TOKENS).view(2, _TOKENS)
    mask = torch.ones_like(ids, dtype=torch.bool)
    expected = run_backbone(second, ids, mask).last_hidden_state
    with evaluation_mode(first), common_trunk(first, second):
        run_backbone(first, ids, mask)
        found = run_backbone(second, ids, mask).last_hidden_state
    return relative_distance(found, expected) <= tolerance(second)
