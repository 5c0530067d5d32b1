"""Labels of classifiers, and what they weigh where several logits become one score.

The score is the weighted sum of the raw logits: no sigmoid and no softmax is taken. Of a classifier of two labels, the
logit of one less that of the other is the log-odds of the one, so that weights of 1 and -1 give those.

Notation: K labels, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_folders import CALIBRATION_FILE, is_adapter
from rlhf_lightning.models.folders import read_config, reason_of
from rlhf_lightning.models.peft_library import load_peft_weights
from rlhf_lightning.runs.lineage import folder_of
from rlhf_lightning.training.sharded import dtype_ahead, full_shape, gathered

LABELS = "labels"
"""Key of an adapter folder's records under which the names of its labels stand."""
_HEADS = (
    "score.",
    "classifier.",
    "classification_head.",
    "logits_proj.",
    "sequence_summary.summary.",
    "base_model.model.score.",
)
"""What the names of the weights of a classifier's head begin with."""


def labels_of(name: str, fetch: bool = False) -> list[str]:
    """Names of a classifier's labels, in the order of its logits; `LABEL_0` and so on where nobody named them.

    transformers leaves names out of the config of two labels that nobody named; then the head says how many there are,
    or, where it is not in files that can be looked into, they are two.

    Args:
        name: folder or hub id of a classifier, or folder of its adapter.
        fetch: ask the hub for the config of an id; without, an id whose config is not here has one label.

    Raises:
        UserError: its config is not as it should be.
    """
    if is_adapter(name):
        named = _recorded_labels(name)
        return named or [f"LABEL_{i}" for i in range(_rows_of_head(name) or 1)]
    said = config_of(name) if fetch else read_config(name)
    found = said.get("id2label")
    if isinstance(found, dict) and found:
        try:
            return [str(found[number]) for number in sorted(found, key=int)]
        except ValueError as error:
            raise UserError(f"id2label in the config of '{name}' does not number its labels: {error}") from error
    return [f"LABEL_{i}" for i in range(int(said.get("num_labels") or _rows_of_head(name) or (2 if said else 1)))]


def config_of(name: str) -> dict[str, Any]:
    """What the config of a model says, asked of the hub if it is not here.

    Args:
        name: folder or hub id.

    Raises:
        UserError: there is none, or it is not as it should be.
    """
    if here := read_config(name):
        return here
    try:
        said: dict[str, Any] = PretrainedConfig.get_config_dict(name)[0]
    except Exception as e:  # whatever the hub's client raises
        raise UserError(f"no model with a scalar head could be loaded from '{name}': {reason_of(e)}") from e
    return said


def _recorded_labels(name: str) -> list[str]:
    path = Path(name) / CALIBRATION_FILE
    if not path.is_file():
        return []
    try:
        return [str(label) for label in json.loads(path.read_text(encoding="utf-8")).get(LABELS) or []]
    except (ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"'{path}' is not as it should be ({e}); export the reward model again") from e


def _rows_of_head(name: str) -> int | None:
    """How many logits the head in the files of a folder gives, 1 where they hold none; None where no file says so."""
    sizes = []
    folder = folder_of(name)
    paths = sorted(folder.glob("*.safetensors")) if folder else []
    for path in paths:
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if key.startswith(_HEADS) and key.endswith("weight")]  # noqa: SIM118
            sizes += [file.get_slice(key).get_shape()[0] for key in keys]
    if folder and not paths and is_adapter(name) and (folder / "adapter_model.bin").is_file():
        try:
            held = load_peft_weights(name, device="cpu")
        except Exception as e:  # whatever reading a file of other people raises
            raise UserError(f"no model with a scalar head could be loaded from '{name}': {reason_of(e)}") from e
        sizes = [len(held[key]) for key in held if key.startswith(_HEADS) and key.endswith("weight")]
    return min(sizes, default=1 if paths else None)  # the last of several layers is the smallest


def label_weights(name: str, labels: Sequence[str], weights: Mapping[str, float] | None) -> list[float] | None:
    """What each logit counts, in their order; None for a single logit as it is.

    Args:
        name: of the classifier, for messages.
        labels: names of its labels, K of them.
        weights: by the names of labels, or by their numbers from 0; labels that are not named weigh 0.

    Returns:
        K numbers, or None.

    Raises:
        UserError: several labels without weights; an unknown label, or one that is named twice; or nothing counts.

    Example:
        >>> label_weights("a/b", ["helpfulness", "verbosity"], {"helpfulness": 0.65, "1": -0.4})
        [0.65, -0.4]
    """
    listed = ", ".join(labels)
    if weights is None:
        if len(labels) == 1:
            return None
        raise UserError(
            f"'{name}' is a classifier with {len(labels)} labels ({listed}), and a reward is one score: say what each "
            f"counts with reward_weights, such as {{{labels[-1]}: 1.0}}"
        )
    found = [0.0] * len(labels)
    named: set[int] = set()
    for key, weight in weights.items():
        label = str(key)
        place = labels.index(label) if label in labels else int(label) if label.isdecimal() else len(labels)
        if place >= len(labels):
            close = get_close_matches(label, labels, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"reward_weights: '{name}' has no label '{label}'; {hint}its labels are {listed}")
        if place in named:
            raise UserError(f"reward_weights names label {place} of '{name}' ({labels[place]}) twice; name it once")
        named.add(place)
        found[place] = float(weight)
    if not any(found):
        raise UserError(f"reward_weights gives no label of '{name}' a weight, so that every score would be 0: {listed}")
    return found


def fold_head(head: nn.Linear, weights: Sequence[float]) -> nn.Linear:
    """One linear layer that gives the weighted sum of another's outputs; every process must call it.

    Args:
        head: `[K, D]`, with a bias or without.
        weights: of its outputs, K numbers.

    Returns:
        A layer of the shape `[1, D]`.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> _ = head.weight.data.copy_(torch.eye(2)), head.bias.data.copy_(torch.tensor([1.0, 2.0]))
        >>> fold_head(head, [3.0, 0.5])(torch.tensor([10.0, 20.0]))
        tensor([44.], grad_fn=<ViewBackward0>)
    """
    weight, has_bias = head.weight, head.bias is not None
    options: dict[str, Any] = {"device": weight.device, "dtype": dtype_ahead(weight)}
    folded = nn.Linear(full_shape(weight)[1], 1, bias=has_bias, **options)
    with torch.no_grad():
        for mine, theirs in zip(folded.parameters(), head.parameters(), strict=True):
            with gathered(theirs, writing=False) as (whole,), gathered(mine) as (target,):
                factors = torch.tensor(weights, dtype=torch.float32, device=whole.device)
                target.copy_((factors @ whole.float()).reshape(target.shape))
    return folded.requires_grad_(weight.requires_grad)
