"""A checkpoint of ZeRO, cut anew for another number of processes.

Each process of a run writes its part of the optimizer's state and of the float32 weights as flat tensors. When a run
goes on with another number of them, each reads of all parts what will be its own, writes that beside the checkpoint in
the same format, and DeepSpeed loads it as if the run had always had as many processes.

DeepSpeed's own way is its universal checkpoint. Left out, because the run would not go on as it was (0.19.8): loaded
on ZeRO-3 it gives all parameter groups the options of the first, weight decay and learning rate among them; it keeps
Adam's two moments only, of any other optimizer nothing; and it does not load buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.checkpoint_files import load_plain

TAG = "checkpoint"
"""The folder inside a checkpoint's in which DeepSpeed's files lie."""

_MODEL, _OPTIMIZER, _STATE = "_mp_rank_00_model_states.pt", "_mp_rank_00_optim_states.pt", "optimizer_state_dict"
_FLAT_3, _FLAT_12, _BASE = "fp32_flat_groups", "single_partition_of_fp32_groups", "base_optimizer_state"


def cutting(path: Path, engine: Any, processes: int, to_train: bool) -> Callable[[Path], None] | None:
    """How a checkpoint is cut anew, where this run cannot load it as it is.

    Args:
        path: of a checkpoint that is whole and plain.
        engine: DeepSpeed's.
        processes: that the checkpoint was saved by.
        to_train: whether the engine has an optimizer, whose state is wanted.

    Returns:
        Writes the part of this process into a folder that is there and empty, for DeepSpeed to load; every process must
        call it. It raises a `UserError` if the checkpoint holds other weights than the model, or the disk is full.
        None if the checkpoint can be loaded.
    """
    zero_3 = engine.zero_optimization_partition_weights()
    if not to_train:
        return partial(_link, path, engine) if zero_3 and processes < engine.dp_world_size else None
    if not engine.zero_optimization():
        return None
    if processes == engine.dp_world_size and not (zero_3 and _saved_groups(path) != _own_groups(engine)):
        return None

    def cut(out: Path) -> None:
        try:
            _cut_anew(path, out, engine, processes)
        except (KeyError, IndexError, ValueError) as e:
            raise UserError(f"'{path}' holds other weights than this model; resume with the same") from e
        except (OSError, RuntimeError) as e:
            raise UserError(f"'{path}' was not cut anew into '{out}': {e}") from e

    return cut


def _link(path: Path, engine: Any, out: Path) -> None:
    """Give each of more processes than have saved it a file to read, for evaluation, which takes the weights of all."""
    (out / TAG).mkdir(exist_ok=True)
    first, mine = (f"zero_pp_rank_{rank}{_MODEL}" for rank in (0, engine.global_rank))
    if not (path / TAG / mine).exists():
        (out / TAG / mine).symlink_to((path / TAG / first).resolve())
    if engine.global_rank == 0:
        for file in (path / TAG).iterdir():
            (out / TAG / file.name).symlink_to(file.resolve())
        (out / "latest").write_text(TAG)


def _cut_anew(path: Path, out: Path, engine: Any, processes: int) -> None:
    rank, world = engine.global_rank, engine.dp_world_size
    name = next((path / TAG).glob(f"*zero_pp_rank_0{_OPTIMIZER}")).name
    parts = [load_plain(path / TAG / name.replace("rank_0_", f"rank_{part}_", 1)) for part in range(processes)]
    states = [part[_STATE] for part in parts]
    zero_3 = engine.zero_optimization_partition_weights()
    state = _cut_3(states, _shapes(path), engine) if zero_3 else _cut_12(states, engine)
    (out / TAG).mkdir(exist_ok=True)
    torch.save({**parts[0], _STATE: state}, out / TAG / name.replace("rank_0_", f"rank_{rank}_", 1))
    if zero_3 or rank == 0:
        model = load_plain(path / TAG / (f"zero_pp_rank_0{_MODEL}" if zero_3 else _MODEL[1:]))
        mine = f"zero_pp_rank_{rank}{_MODEL}" if zero_3 else _MODEL[1:]
        torch.save({**model, "dp_world_size": world}, out / TAG / mine)
    if rank == 0:
        (out / "latest").write_text(TAG)


def _shapes(path: Path) -> list[dict[str, torch.Size]]:
    """Names and shapes of the weights, by the groups that ZeRO-3 saved them in."""
    shapes: list[dict[str, torch.Size]] = load_plain(path / TAG / f"zero_pp_rank_0{_MODEL}")["param_shapes"]
    return shapes


def _saved_groups(path: Path) -> list[list[str]]:
    return [[*group] for group in _shapes(path)]


def _own_groups(engine: Any) -> list[list[str]]:
    return [[engine.param_names[weight] for weight in group] for group in engine.optimizer.fp16_groups]


def pieces(lengths: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, slice]]:
    """Where `start` to `stop` of a row lies, when the row is cut into parts of these lengths.

    Example:
        >>> list(pieces([4, 4], 2, 6))
        [(0, slice(2, 4, None)), (1, slice(0, 2, None))]
    """
    begin = 0
    for part, length in enumerate(lengths):
        first, last = max(start - begin, 0), min(stop - begin, length)
        if first < last:
            yield part, slice(first, last)
        begin += length


def _cut(parts: Sequence[Tensor], whole: int, rank: int, size: int) -> Tensor:
    """Part `rank` of a row of `whole` numbers, cut into parts of `size`, with zeros after its end."""
    cut = torch.zeros(size, dtype=parts[0].dtype)
    place = 0
    for part, where in pieces([len(each) for each in parts], rank * size, min((rank + 1) * size, whole)):
        found = parts[part][where]
        cut[place : place + len(found)] = found
        place += len(found)
    return cut


def _cut_12(states: list[dict[str, Any]], engine: Any) -> dict[str, Any]:
    """Of ZeRO-1 and -2, which lay all weights of a parameter group end to end and cut that row."""
    optimizer, rank = engine.optimizer, engine.global_rank
    in_bf16 = hasattr(optimizer, "bf16_groups")
    weights = optimizer.bf16_groups if in_bf16 else optimizer.bit16_groups
    masters = optimizer.fp32_groups_flat_partition if in_bf16 else optimizer.single_partition_of_fp32_groups
    groups = states[0][_BASE]["param_groups"]
    kept: dict[int, dict[str, Any]] = {}
    flat, paddings = [], []
    for number, (group, mine) in enumerate(zip(groups, masters, strict=True)):
        whole, size, (index,) = sum(weight.numel() for weight in weights[number]), mine.numel(), group["params"]
        rows = [state[_FLAT_12][number] for state in states]
        if not 0 <= sum(map(len, rows)) - whole <= 4 * len(states):  # but for what fills up the last part
            raise KeyError(number)
        flat.append(_cut(rows, whole, rank, size))
        olds = [state[_BASE]["state"].get(index, {}) for state in states]
        kept[index] = {
            key: _cut([old[key] for old in olds], whole, rank, size) if _is_row(value) else value
            for key, value in olds[0].items()
        }
        paddings.append(size * engine.dp_world_size - whole if rank == engine.dp_world_size - 1 else 0)
    dropped = ("param_slice_mappings", "universal_checkpoint_info")
    return {
        **{key: value for key, value in states[0].items() if key not in dropped},
        _BASE: {**states[0][_BASE], "state": {index: state for index, state in kept.items() if state}},
        _FLAT_12: flat,
        "group_paddings": paddings,
        "partition_count": optimizer.partition_count,
    }


def _is_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1


def _cut_3(states: list[dict[str, Any]], shapes: list[dict[str, torch.Size]], engine: Any) -> dict[str, Any]:
    """Of ZeRO-3, which cuts each weight by itself and lays the parts end to end, in groups of its own."""
    optimizer, processes = engine.optimizer, len(states)
    places: dict[str, tuple[int, int, int]] = {}  # group, offset and whole length of each weight
    for number, group in enumerate(shapes):
        offset = 0
        for name, shape in group.items():
            places[name] = number, offset, shape.numel()
            offset += -(-shape.numel() // processes)

    def joined(names: list[str], row_of: Callable[[dict[str, Any], int], Tensor]) -> Tensor:
        rows = []
        for name in names:
            number, offset, whole = places[name]
            length = -(-whole // processes)
            parts = [row_of(state, number)[offset : offset + length] for state in states]
            rows.append(_cut(parts, whole, engine.global_rank, -(-whole // engine.dp_world_size)))
        return torch.cat(rows)

    def moment(key: str) -> Callable[[dict[str, Any], int], Tensor]:
        return lambda state, number: state[_STATE]["state"][number][key]

    names, kept = _own_groups(engine), {}
    for number, group_names in enumerate(names):
        old = states[0][_STATE]["state"].get(places[group_names[0]][0], {})
        kept[number] = {
            key: joined(group_names, moment(key)) if _is_row(value) else value for key, value in old.items()
        }
    options = states[0][_STATE]["param_groups"]
    members = [[n for n in kept if optimizer.sub_group_to_group_id[n] == group] for group in range(len(options))]
    groups = [{**given, "params": numbers} for given, numbers in zip(options, members, strict=True)]
    return {
        **states[0],
        _STATE: {"state": {n: state for n, state in kept.items() if state}, "param_groups": groups},
        _FLAT_3: [joined(group_names, lambda state, number: state[_FLAT_3][number]) for group_names in names],
        "partition_count": engine.dp_world_size,
    }
