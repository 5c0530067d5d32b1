"""What lies in an exported folder beside its weights, and how it is written, from a run or from a checkpoint of one."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.callbacks.model_card import CARD, Told, card_text
from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.models.adapter_folders import CALIBRATION_FILE
from rlhf_lightning.models.eos import eos_ids
from rlhf_lightning.models.lora import adapter_state
from rlhf_lightning.models.merging import adapter_names
from rlhf_lightning.models.portable import rewrite_config, save_tokenizer
from rlhf_lightning.models.rendering import RENDERING
from rlhf_lightning.models.saving import MAX_SHARD_SIZE, Group, WeightPlan
from rlhf_lightning.models.scalar_lm import CALIBRATION
from rlhf_lightning.runs.lineage import TRAINED_ON, write_record
from rlhf_lightning.runs.secrets import without_secrets
from rlhf_lightning.runs.whole_files import write_whole


class ModelFolder:
    """A plain model, its adapters added to its weights.

    Args:
        model: with adapters or without.
        dtype: type of the saved weights; None for the one they have.
        max_shard_size: of a file, in bytes or such as `5GB`.

    Attributes:
        groups: the weights to ask for.
    """

    is_adapter = False

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        self._model = model
        self._plan = WeightPlan(model, dtype, max_shard_size)
        self.groups = self._plan.groups

    def write(self, folder: Path, weights: Iterable[Mapping[str, Tensor]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the weights and what the model needs beside them.

        Args:
            folder: empty.
            weights: for each of `groups` its sources by name, whole.
            tokenizer: of the model; says where answers end.
        """
        # The configs, and the code of a model that brings its own; files of weights that are there it would remove.
        self._model.save_pretrained(folder, state_dict={})
        self._plan.write(folder, weights)
        rewrite_config(folder)
        if self._model.can_generate():
            _generation_config(self._model, tokenizer).save_pretrained(folder)


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
        for sources in weights:
            kept |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in sources.items()}
        state = adapter_state(self._model, kept)
        if self._dtype is not None:
            state = {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in state.items()}
        write_adapter(self._model, state, self._base, folder)


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
    if calibration := getattr(model.config, CALIBRATION, None):
        records = {**calibration, RENDERING: getattr(model.config, RENDERING, None)}
        (folder / CALIBRATION_FILE).write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def write_around(
    folder: Path, tokenizer: PreTrainedTokenizerBase, told: Told, record: Mapping[str, Any], prompts: np.ndarray
) -> None:
    """Write what stands beside a model: its tokenizer, its card, and where it comes from.

    Args:
        folder: of the model.
        tokenizer: with the chat template of the data.
        told: what the card says.
        record: of its lineage.
        prompts: hashes of those that it and the stages before it were trained on; empty where they are not known.
    """
    save_tokenizer(tokenizer, folder)
    (folder / CARD).write_text(without_secrets(card_text(told)), encoding="utf-8")
    write_record(folder, record)
    write_trained_on(folder, prompts)


def write_trained_on(folder: Path, prompts: np.ndarray) -> None:
    """Write which prompts a model was trained on; no file where none are known.

    Args:
        folder: of an export or a run.
        prompts: their hashes, sorted, uint64.
    """
    (folder / TRAINED_ON).unlink(missing_ok=True)
    if len(prompts):
        content = io.BytesIO()
        np.save(content, prompts)
        write_whole(folder / TRAINED_ON, content.getvalue())


def _generation_config(model: Any, tokenizer: Any) -> GenerationConfig:
    config: GenerationConfig = model.generation_config
    ends = eos_ids(tokenizer, config.eos_token_id)
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    return config
