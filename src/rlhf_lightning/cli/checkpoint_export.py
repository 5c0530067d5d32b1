"""A checkpoint of a run as the folder that `HFExport` would have written then, by one process, weight by weight.

The checkpoint says which stage it is of, from which model that started, and holds what was trained. All else is read
from the folder of that model: its config and tokenizer, and what was frozen, which no checkpoint holds. Weights stay on
the disk until it is their turn, unless that model is itself an adapter, which must be merged in memory first.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.algorithms.export_record import BEGAN_AS, BESIDE, FROZEN, OTHERS, RENDERING, TEMPLATE, VALUE
from rlhf_lightning.algorithms.regression import ScoreRegressionModule
from rlhf_lightning.algorithms.reward import RewardModule
from rlhf_lightning.algorithms.sft import SFTModule
from rlhf_lightning.algorithms.stage import Stage
from rlhf_lightning.callbacks.export_folder import replace_folder
from rlhf_lightning.callbacks.model_card import Told
from rlhf_lightning.callbacks.model_folder import write_around
from rlhf_lightning.chat.encoder import ChatEncoder
from rlhf_lightning.chat.fingerprint import hash_of_tokenizer
from rlhf_lightning.cli.value_export import PREFIX, ValueStage, value_record
from rlhf_lightning.errors import UserError
from rlhf_lightning.models import rendering
from rlhf_lightning.models.adapter_folders import adapter_base, is_adapter
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.folders import looks_local, same_model
from rlhf_lightning.models.heads import write_heads
from rlhf_lightning.models.stored import stored_dtype
from rlhf_lightning.models.tokenizer import load_tokenizer
from rlhf_lightning.models.written_folders import AdapterFolder, ModelFolder
from rlhf_lightning.runs.lineage import TRAINED_ON, all_trained_on, folder_of, hash_of_weights, read_record, short
from rlhf_lightning.training.saved_weights import SavedWeights, open_weights

Part = Literal["model", "value"]
"""What of a checkpoint is exported: the model of its stage, or PPO's value model."""

_STATE, _SETTINGS, _LOGS = "rlhf_lightning", "hyper_parameters", "rlhf_lightning_logs"
_POLICY = (
    *("DPOModule", "PPOModule", "RLOOModule", "GRPOModule"),
    *("ReferenceStage", "AnsweringStage", "OnlineStage", "GroupStage"),  # what others derive stages of their own from
)
_PLACES: dict[str, tuple[Any, str]] = {
    "SFTModule": (SFTModule, "model."),
    "RewardModule": (RewardModule, "scalar.model."),
    "ScoreRegressionModule": (ScoreRegressionModule, "model."),
    **dict.fromkeys(_POLICY, (SFTModule, "policy.")),
}
"""What loads the model that a stage exports, and what the names of its weights begin with in the stage."""

HEADS = "scalar.ensemble.layer.weight"
"""Name of what a reward model's several heads are, in its stage."""


class Checkpoint(NamedTuple):
    """A checkpoint, and what it says of its run.

    Attributes:
        path: of it.
        weights: what it holds.
        prefix: what the names of the weights of the exported model begin with.
        role: of the model that `base` is, among those that the stage began with.
        state: what the stage has saved.
        settings: the arguments of the stage.
        base: folder or hub id of the model that the exported one began as, where it is now.
        finetune: which weights were trained.
    """

    path: Path
    weights: SavedWeights
    prefix: str
    role: str
    state: dict[str, Any]
    settings: dict[str, Any]
    base: str
    finetune: FineTune

    @property
    def said(self) -> dict[str, Any]:
        """What it says of the exported model, see `algorithms/export_record.py`."""
        said: dict[str, Any] = self.state["export"]
        return said[VALUE] if self.is_value else said

    @property
    def is_value(self) -> bool:
        """Whether the value model is exported."""
        return self.prefix == PREFIX

    @property
    def lineage(self) -> dict[str, Any]:
        """What the stage came from."""
        lineage: dict[str, Any] = self.state["lineage"]
        return lineage


def read_checkpoint(path: Path, base: str | None = None, part: Part = "model") -> Checkpoint:
    """Open a checkpoint of a stage.

    Args:
        path: a file, or the folder that several processes wrote.
        base: where the model is now that training started from; None for where it was.
        part: which model will be exported.

    Raises:
        UserError: it is not whole, not of a stage, has no such part, or the model is gone or another.
    """
    try:
        weights = open_weights(path)
    except UserError as e:
        raise UserError(str(e).replace("; resume from", "; export")) from e
    state, settings = weights.states.get(_STATE), weights.states.get(_SETTINGS)
    if not isinstance(state, dict) or not isinstance(settings, dict) or not isinstance(state.get("lineage"), dict):
        raise UserError(f"'{path}' was not made by this package; export one of its own checkpoints")
    if "export" not in state:
        raise UserError(
            f"'{path}' is of an earlier version of this package: resume it with --ckpt_path, and export what that saves"
        )
    if state["stage"] not in _PLACES:
        raise UserError(f"'{path}' is of a stage that is not of this package; export it with the callback HFExport")
    finetune = FineTune(**settings["finetune"])
    name, role, prefix = str(settings["model_name_or_path"]), "model", _PLACES[state["stage"]][1]
    if part == "value":
        role, prefix = value_record(path, weights.tensors, state["export"])[BEGAN_AS], PREFIX
        name = str(state["lineage"]["models"][role]["name"])
    found = _find_base(name, base)
    checkpoint = Checkpoint(path, weights, prefix, role, state, settings, found, finetune)
    _check_base(checkpoint)
    return checkpoint


def _find_base(name: str, given: str | None) -> str:
    place = str(Path(given or name).expanduser())
    if looks_local(place) and not Path(place).is_dir():
        hint = "name a folder that is there" if given else "name where it is now with --base"
        raise UserError(f"the model that training started from is not at '{place}'; {hint}")
    return place


def _check_base(checkpoint: Checkpoint) -> None:
    """What was frozen is in the base alone, and must be what it was."""
    if checkpoint.finetune.mode == "all":
        return
    model = checkpoint.lineage["models"][checkpoint.role]
    names = [checkpoint.base, *([adapter_base(checkpoint.base)] if is_adapter(checkpoint.base) else [])]
    hashes = [model["weights"], *([model["base"]["weights"]] if "base" in model else [])]
    if len(names) != len(hashes):
        raise UserError(f"'{checkpoint.base}' is not the model that training started from; name that one with --base")
    for name, then in zip(names, hashes, strict=True):
        folder = folder_of(name)
        now = None if folder is None else hash_of_weights(folder)
        if then is not None and now is not None and then != now:
            raise UserError(
                f"'{name}' has other weights ({short(now)}) than the model that training started from ({short(then)}), "
                "and the checkpoint holds only what was trained; name the right folder with --base"
            )


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    trust_remote_code: bool = False,
) -> None:
    """Write the folder.

    Args:
        checkpoint: of a stage.
        folder: replaced if it is an export.
        dtype: type of the saved weights; None for the one they were trained in.
        max_shard_size: of a file of weights.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        UserError: the checkpoint does not fit the model that training started from, or something else lies there.
    """
    stage = _load_stage(checkpoint, trust_remote_code)
    model = stage.export_model
    frozen = _frozen_weights(checkpoint, model)
    _forget_weights(checkpoint, model, frozen)
    written: ModelFolder | AdapterFolder
    beside = checkpoint.is_value and checkpoint.said[BESIDE]
    merged = checkpoint.is_value and is_adapter(checkpoint.base) and not beside  # no adapter stands on a reward adapter
    if checkpoint.finetune.export == "adapter" and not merged:
        written = AdapterFolder(model, adapter_base(checkpoint.base) if beside else checkpoint.base, dtype)
    else:
        written = ModelFolder(model, dtype, max_shard_size)

    def read(name: str) -> Tensor:
        if name in frozen:
            weight, held_in = frozen[name]
            return weight.to(held_in)
        return checkpoint.weights.read(checkpoint.prefix + name)

    weights = ({name: read(name) for name in group.sources} for group in written.groups)

    def write(new: Path) -> None:
        written.write(new, weights, stage.tokenizer)
        if HEADS in checkpoint.weights.tensors and not checkpoint.is_value:
            write_heads(new, checkpoint.weights.read(HEADS), dtype)
        told = _told(checkpoint, stage, new)
        write_around(new, stage.tokenizer, told, checkpoint.lineage, _trained_on(checkpoint))

    replace_folder(folder, write)


# The model


def _load_stage(checkpoint: Checkpoint, trust_remote_code: bool) -> Stage:
    """The stage with its model and tokenizer as it had them, the weights those of its base."""
    if checkpoint.is_value:
        beside = checkpoint.said[BESIDE]
        value, reward = (checkpoint.settings.get(name) for name in ("value_name_or_path", "reward"))
        named = isinstance(value, str) and isinstance(reward, str) and same_model(value, reward)
        is_reward = checkpoint.role == "reward" or named
        weights = checkpoint.settings.get("reward_weights") if is_reward else None
        stage: Any = ValueStage(checkpoint.base, beside, checkpoint.finetune, trust_remote_code, weights)
    else:
        kind, _ = _PLACES[checkpoint.state["stage"]]
        options = {name: checkpoint.settings[name] for name in ("attributes",) if name in checkpoint.settings}
        stage = kind(checkpoint.base, finetune=checkpoint.finetune, trust_remote_code=trust_remote_code, **options)
    stage.tokenizer = load_tokenizer(checkpoint.base, trust_remote_code)
    with _default_dtype(stored_dtype(checkpoint.base)):  # weights that are not cast stay on the disk
        stage.load_models()
    own = hash_of_tokenizer(stage.tokenizer, ChatEncoder(stage.tokenizer, "plain").prefix)
    # What a value model began as may have a tokenizer that is the same in effect only.
    if checkpoint.role == "model" and own != checkpoint.lineage["tokenizer"]:
        raise UserError(
            f"'{checkpoint.base}' has another tokenizer ({short(own)}) than the model that training started from "
            f"({short(checkpoint.lineage['tokenizer'])}); name the right folder with --base"
        )
    said = checkpoint.state["export"]
    stage.tokenizer.chat_template = said[TEMPLATE]
    setattr(stage.export_model.config, rendering.RENDERING, said[RENDERING])
    if isinstance(stage, RewardModule) and not checkpoint.is_value:
        stage.load_run_state(checkpoint.state)
        _say_when_calibrated(checkpoint)
    return stage


def _say_when_calibrated(checkpoint: Checkpoint) -> None:
    """A run calibrates with each validation, and at its end: after the last checkpoint, where that was not one."""
    at, now = checkpoint.state["calibrated_at"], checkpoint.weights.states["global_step"]
    if at == now:
        return
    what = "not calibrated (mean 0, std 1)" if at is None else f"calibrated by the weights of step {at}"
    print(
        f"no validation went before '{checkpoint.path}', of step {now}, so its scores are {what}; a checkpoint that is "
        "saved after a validation has a calibration of its own",
        file=sys.stderr,
    )


def _frozen_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, tuple[Tensor, torch.dtype]]:
    """What the checkpoint does not hold: weights of the base, and the type that each was held in."""
    saved, prefix, said = checkpoint.weights.tensors, checkpoint.prefix, checkpoint.said
    own = model.state_dict(keep_vars=True)
    reason = f"'{checkpoint.path}' does not fit '{checkpoint.base}'"
    frozen = {}
    for name, weight in own.items():
        if prefix + name in saved:
            shape = saved[prefix + name].shape
            if shape != weight.shape:
                raise UserError(f"{reason}: its weight '{name}' has the shape {list(shape)}, not {list(weight.shape)}")
        elif weight.requires_grad:
            raise UserError(f"{reason}: it has no weight '{name}'")
        else:
            held_in = weight.dtype
            if isinstance(weight, nn.Parameter) and weight.is_floating_point():
                held_in = getattr(torch, said[OTHERS].get(name, said[FROZEN]))
            frozen[name] = weight.detach(), held_in
    for name in sorted(name.removeprefix(prefix) for name in saved if name.startswith(prefix)):
        # What comes after the name of a weight is how four bits of it were packed.
        if not any(place in own for place in itertools.accumulate(name.split("."), "{}.{}".format)):
            raise UserError(f"{reason}: its weight '{prefix}{name}' is unknown")
    return frozen


def _forget_weights(
    checkpoint: Checkpoint, model: PreTrainedModel, frozen: dict[str, tuple[Tensor, torch.dtype]]
) -> None:
    """Leave of the model's weights what they were in the run, without the numbers."""
    made: dict[int, Any] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        dtype = frozen[name][1] if name in frozen else checkpoint.weights.tensors[checkpoint.prefix + name].dtype
        if id(weight) not in made:
            empty = torch.empty(weight.shape, dtype=dtype, device="meta")
            made[id(weight)] = nn.Parameter(empty, False) if isinstance(weight, nn.Parameter) else empty
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: made[id(weight)] for name, weight in held.items() if id(weight) in made})


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# What the folder says of itself


def _run_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder of the run that saved the checkpoint, if that is still in it."""
    for folder in checkpoint.path.resolve().parents[:2]:
        if read_record(folder) == checkpoint.lineage:
            return folder
    return None


def _trained_on(checkpoint: Checkpoint) -> np.ndarray:
    """Hashes of the prompts that the model and those before it were trained on."""
    folder = _run_folder(checkpoint)
    if folder is not None and (folder / TRAINED_ON).is_file():
        return all_trained_on(iter([str(folder)]), np.zeros(0, np.uint64))
    if checkpoint.lineage.get("data") is not None:
        print(
            f"'{checkpoint.path}' is not in the folder of its run: which prompts it was trained on is not known, so no "
            "later stage will see that it is validated on them",
            file=sys.stderr,
        )
    names = [model["name"] for model in checkpoint.lineage["models"].values()]
    return all_trained_on(iter(dict.fromkeys(names)), np.zeros(0, np.uint64))


def _told(checkpoint: Checkpoint, stage: Stage, new: Path) -> Told:
    settings: dict[str, Any] = {"module": checkpoint.settings}
    folder = _run_folder(checkpoint)
    if folder is not None and (folder / "config.yaml").is_file():
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        settings["data"] = (config.get("data") or {}).get("init_args")
    return Told(
        checkpoint.lineage["stage"] + (" value model" if checkpoint.is_value else ""),
        str(checkpoint.lineage["models"][checkpoint.role]["name"]),
        checkpoint.weights.states["global_step"],
        settings,
        checkpoint.weights.states.get(_LOGS, {}).get("logged", {}),
        is_adapter(str(new)),
        isinstance(stage, RewardModule) and bool(stage.tokenizer.chat_template),
        str(checkpoint.path),
    )
