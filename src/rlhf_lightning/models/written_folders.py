"""A model written as a Hugging Face folder, or its adapters as a PEFT folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.models.adapter_folders import CALIBRATION_FILE
from rlhf_lightning.models.eos import eos_ids
from rlhf_lightning.models.labels import LABELS
from rlhf_lightning.models.lora import adapter_state
from rlhf_lightning.models.merging import adapter_names
from rlhf_lightning.models.portable import rewrite_config
from rlhf_lightning.models.rendering import RENDERING
from rlhf_lightning.models.saving import MAX_SHARD_SIZE, Group, WeightPlan
from rlhf_lightning.models.scalar_lm import CALIBRATION


class ModelFolder:
    """A plain model, its adapters added to its weights.

    Args:
        model: with adapters or without.
        dtype: type of the saved weights; None for the one they have.
        max_shard_size: of a file, in bytes or such as `5GB`.
        merged: add the adapters to their weights; without, the weights are those that adapters stand on.

    Attributes:
        groups: the weights to ask for.
    """

    is_adapter = False

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        merged: bool = True,
    ) -> None:
        self._model = model
        self._plan = WeightPlan(model, dtype, max_shard_size, merged)
        self.groups = self._plan.groups

    def write(self, folder: Path, weights: Iterable[Mapping[str, Tensor]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the weights and what the model needs beside them.

        Args:
            folder: empty.
            weights: for each of `groups` its sources by name, whole.
            tokenizer: of the model; says where answers end.
        """
        write_configs(self._model, folder)
        self._plan.write(folder, weights)
        if self._model.can_generate():
            _generation_config(self._model, tokenizer).to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True)


class AdapterFolder:
    """The adapters of a model, as PEFT has them.

    Args:
        model: with adapters.
        base: folder or hub id of the model that they stand on.
        dtype: type of the saved weights; None for the one they have.

    Attributes:
        groups: the weights to ask for: adapters, and a classifier's head.
    """

    is_adapter = True

    def __init__(self, model: PreTrainedModel, base: str, dtype: torch.dtype | None = None) -> None:
        self._model, self._base, self._dtype = model, base, dtype
        names = list(model.state_dict(keep_vars=True))
        adapters = {*adapter_names(model, names)}
        wanted = [name for name in names if name in adapters or name.startswith(f"{HEAD}.")]
        self.groups = [Group((name,), (), ()) for name in wanted]

    def write(self, folder: Path, weights: Iterable[Mapping[str, Tensor]], tokenizer: PreTrainedTokenizerBase) -> None:
        """The two files of a PEFT folder; a reward model's head is one of its weights, its calibration a third file.

        Args:
            folder: empty.
            weights: for each of `groups` its one source by name, whole.
            tokenizer: not needed.
        """
        kept: dict[str, Tensor] = {}
        untyped: Any = self._model
        for sources in weights:
            kept |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in sources.items()}
        (name,) = untyped.peft_config
        state = adapter_state(self._model, kept, name)
        if self._dtype is not None:
            state = {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in state.items()}
        write_adapter(self._model, state, self._base, folder)


def write_configs(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's config, and its code if it brings its own; no weights, and nothing of its generation config.

    Some releases of transformers refuse to save a model whose generation config has a temperature and no sampling, as
    many on the hub do.

    Args:
        model: on one process or split over several.
        folder: without weights, for they would be removed.
    """
    bars, kept = is_progress_bar_enabled(), vars(model).get("generation_config")
    if kept is not None:
        model.generation_config = GenerationConfig()
    disable_progress_bar()  # of no weights
    try:
        model.save_pretrained(folder, state_dict={})
    finally:
        if kept is not None:
            model.generation_config = kept
        if bars:
            enable_progress_bar()
    (folder / GENERATION_CONFIG_NAME).unlink(missing_ok=True)
    rewrite_config(folder)


def write_adapter(model: Any, weights: dict[str, Tensor], base: str, folder: Path) -> None:
    """Write a PEFT folder.

    Args:
        model: with adapters.
        weights: as `lora.adapter_state` gives them.
        base: folder or hub id of the model that they stand on.
        folder: which is there.
    """
    (config,) = model.peft_config.values()
    config = copy.copy(config)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.modules_to_save = [HEAD] if hasattr(model, HEAD) else None
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    calibration, is_several = getattr(model.config, CALIBRATION, None), hasattr(model, HEAD) and model.num_labels > 1
    if calibration or is_several:
        named = {LABELS: [model.config.id2label[i] for i in range(model.num_labels)]} if is_several else {}
        records = {**(calibration or {}), **named, RENDERING: getattr(model.config, RENDERING, None)}
        (folder / CALIBRATION_FILE).write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def _generation_config(model: Any, tokenizer: Any) -> GenerationConfig:
    config: GenerationConfig = model.generation_config
    ends = eos_ids(tokenizer, config.eos_token_id)
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return config
