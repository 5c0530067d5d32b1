"""What an engine with weights of its own is given of the policy: all of them, or adapters beside a base sent once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.lora import lora_layers
from rlhf_lightning.models.saving import WeightPlan, whole_weights
from rlhf_lightning.models.written_folders import AdapterFolder, ModelFolder

SentLora = Literal["adapters", "merged"]


class PolicyWeights:
    """The policy's weights, one after the other under the names that its exported folder has.

    Each weight of a policy that is split over processes is gathered by itself, so that there is never a second copy of
    it; every process must take part.

    Args:
        model: the policy.
        lora: `adapters` sends the adapters of a policy with LoRA, `merged` its weights with the adapters added.

    Attributes:
        adapters: adapters are sent. Not with DoRA or adapters of bare parameters, which engines do not serve.

    Raises:
        UserError: weights are held in four bits.
    """

    def __init__(self, model: PreTrainedModel, lora: SentLora) -> None:
        if any(hasattr(weight, "quant_state") for weight in model.parameters()):
            raise UserError("an engine with weights of its own takes none in four bits; leave frozen_dtype at auto")
        self._model = model
        has_lora = any(True for _ in lora_layers(model))
        self.adapters = has_lora and lora == "adapters" and _is_served(model)
        if has_lora and lora == "adapters" and not self.adapters:
            rank_zero_info("the engine gets the policy's adapters merged: it serves plain LoRA of linear layers only")
        self._plan = WeightPlan(model, merged=not self.adapters)

    @property
    def rank(self) -> int:
        """Inner dimension of the adapters."""
        model: Any = self._model
        (config,) = model.peft_config.values()
        return int(config.r)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights; those that adapters stand on, where adapters are sent. See `WeightPlan.tensors`."""
        return self._plan.tensors()

    def write(self, folder: Path | None, tokenizer: PreTrainedTokenizerBase, base: bool = False) -> None:
        """Write what has changed as a folder: a model's, or a PEFT folder of adapters. Every process must call it.

        Args:
            folder: does not exist; None on processes that only take part.
            tokenizer: the policy's.
            base: the weights that adapters stand on instead of the adapters.
        """
        written: ModelFolder | AdapterFolder
        if self.adapters and not base:
            written = AdapterFolder(self._model, "policy")
        else:
            written = ModelFolder(self._model, merged=not self.adapters)
        weights = whole_weights(self._model, written.groups)
        try:
            if folder is not None:
                folder.mkdir(parents=True)
                written.write(folder, weights, tokenizer)
        finally:
            for _ in weights:  # the other processes take part in each
                pass


def _is_served(model: Any) -> bool:
    configs = list(model.peft_config.values())
    return len(configs) == 1 and not configs[0].use_dora and not configs[0].target_parameters
