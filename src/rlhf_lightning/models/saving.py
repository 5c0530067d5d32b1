"""The weights of a model as a Hugging Face folder, written one after the other: the model is never held twice.

What `save_pretrained` writes follows from names, types and shapes alone: which of tied weights stays, what the hub
calls them, and which file each goes into. So that is planned first, on tensors without memory; then each weight is
asked for, merged with its adapters, cast, converted and written to its place, and let go. Memory holds the largest
weight and what is made of it, whatever the size of the model and of its files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from rlhf_lightning.compat import as_saved, saved_names
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.merging import plain_weights
from rlhf_lightning.models.safetensors_files import TensorFile
from rlhf_lightning.training.sharded import full_shape, gathered

MAX_SHARD_SIZE = "5GB"
"""Of a file of weights, unless one weight alone is larger."""


def check_shard_size(size: int | str, name: str) -> None:
    """Refuse what says no size.

    Args:
        size: bytes, or a number with a unit.
        name: of the argument, for the message.

    Raises:
        UserError: it does not.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return
    if not isinstance(size, str) or not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", size, re.IGNORECASE):
        raise UserError(f"{name} is '{size}'; give bytes, or a number with KB, MB, GB or TB, like 5GB")


class Group(NamedTuple):
    """Weights that can only be written together, most often one.

    Attributes:
        sources: names of the model's own weights that are needed.
        plain: names of the plain model's weights that they become.
        saved: names in the files that those become.
    """

    sources: tuple[str, ...]
    plain: tuple[str, ...]
    saved: tuple[str, ...]


class WeightPlan:
    """Which weights of a model are written, as what, and where.

    Args:
        model: with adapters or without, on one process or split over several.
        dtype: type that floating-point weights are written in; None for the one they have.
        max_shard_size: of a file, in bytes or such as `5GB`.
        merged: add the adapters to their weights; without, the weights are those that adapters stand on.

    Attributes:
        groups: what to ask for, in this order: the same on every process.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        merged: bool = True,
    ) -> None:
        own = model.state_dict(keep_vars=True)
        self._model, self._dtype = model, dtype
        self._plain = plain_weights(model, own, merged)
        # One number stands for each weight: transformers knows tied ones by where they lie.
        numbers = {id(tensor): torch.empty(1) for tensor in own.values()}
        alone = {
            name: torch.empty(1) if weight.merge else numbers[id(own[weight.sources[0]])]
            for name, weight in self._plain.items()
        }
        planned = {name: self._planned(name, own) for name in saved_names(model, alone)}
        self._num_parameters = sum(
            tensor.numel()
            for name, tensor in planned.items()
            if isinstance(own[self._plain[name].sources[0]], nn.Parameter)
        )
        saved = {name: _empty(tensor) for name, tensor in as_saved(model, planned).items()}
        self._saved = saved
        self.groups = [
            Group(tuple(dict.fromkeys(s for name in names for s in self._plain[name].sources)), names, become)
            for names, become in _groups(model, planned, saved)
        ]
        self._files = split_torch_state_dict_into_shards(saved, max_shard_size=max_shard_size)

    def _planned(self, name: str, own: Mapping[str, Tensor]) -> Tensor:
        weight = own[self._plain[name].sources[0]]
        cast = self._dtype if self._dtype is not None and weight.is_floating_point() else weight.dtype
        return torch.empty(full_shape(weight), dtype=cast, device="meta")

    def write(self, folder: Path, weights: Iterable[Mapping[str, Tensor]]) -> None:
        """Write the files of weights.

        Args:
            folder: of the model, which is there.
            weights: for each of `groups`, in their order, its sources by name, whole; on any device.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        places, shards = self._files.tensor_to_filename, self._files.filename_to_tensors
        with ExitStack() as held:
            files = {
                file: held.enter_context(TensorFile(folder / file, {name: self._saved[name] for name in names}))
                for file, names in shards.items()
            }
            for group, sources in zip(self.groups, weights, strict=True):
                # On the CPU, where all machines compute alike.
                on_cpu = {name: tensor.detach().cpu() for name, tensor in sources.items()}
                for name, tensor in self._made(group, on_cpu).items():
                    files[places[name]].write(name, tensor)
        if len(shards) > 1:
            metadata = {"total_parameters": self._num_parameters, **self._files.metadata}
            text = json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True)
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text + "\n", encoding="utf-8")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the files would hold, one weight after the other by its name there, on the model's device.

        Every process must go through all of them. A tensor may be the model's own: it is not to be written, and not to
        be kept once the next is asked for.
        """
        for group, sources in zip(self.groups, whole_weights(self._model, self.groups), strict=True):
            yield from self._made(group, {name: tensor.detach() for name, tensor in sources.items()}).items()

    @torch.no_grad()
    def _made(self, group: Group, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is written of a group."""
        plain = {name: self._plain[name].of(sources) for name in group.plain}
        if self._dtype is not None:
            plain = {n: tensor.to(self._dtype) if tensor.is_floating_point() else tensor for n, tensor in plain.items()}
        return plain if group.plain == group.saved else as_saved(self._model, plain)


def whole_weights(model: nn.Module, groups: Iterable[Group]) -> Iterator[dict[str, Tensor]]:
    """The sources of each group, for as long as the next is not asked for; every process must go through all.

    Args:
        model: that they are of, on one process or split over several.
        groups: in the same order on every process.
    """
    own = model.state_dict(keep_vars=True)
    for group in groups:
        with gathered(*(own[name] for name in group.sources), writing=False) as wholes:
            yield dict(zip(group.sources, wholes, strict=True))


def _empty(tensor: Tensor) -> Tensor:
    """One of the same type and shape that shares memory with no other, so that its size is its own."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


Names = tuple[str, ...]


def _groups(
    model: PreTrainedModel, planned: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> list[tuple[Names, Names]]:
    """The fewest weights that must be there at once, and what they become.

    transformers converts whole models. Whether a weight may be converted by itself is found by trying: without memory.
    """
    if list(planned) == list(saved):
        return [((name,), (name,)) for name in planned]
    groups: list[tuple[Names, Names]] = []
    left = []
    for name in planned:
        become = _become(model, {name: planned[name]}, saved)
        if become is None:
            left.append(name)
        else:
            groups.append(((name,), become))
    blocks: dict[str, list[str]] = {}
    for name in left:  # such as the two halves of a layer that the hub has as one
        blocks.setdefault(_block(name), []).append(name)
    for names in blocks.values():
        become = _become(model, {name: planned[name] for name in names}, saved)
        if become is None:
            return [(tuple(planned), tuple(saved))]
        groups.append((tuple(names), become))
    made = [name for _, become in groups for name in become]
    if len(made) != len(saved) or set(made) != set(saved):
        return [(tuple(planned), tuple(saved))]
    return groups


def _become(model: PreTrainedModel, some: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> Names | None:
    """What some weights become by themselves; None if that is not what they become in the whole model."""
    try:
        become = as_saved(model, some)
    except Exception:  # whatever a conversion raises that lacks a part
        return None
    agree = all(name in saved and tensor.shape == saved[name].shape for name, tensor in become.items())
    return tuple(become) if agree else None


def _block(name: str) -> str:
    """Name of the innermost numbered module that a weight is in."""
    parts: list[Any] = name.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])
