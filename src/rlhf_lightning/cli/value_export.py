"""The value model in a checkpoint of PPO: what it began as, and that model as the run had it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from rlhf_lightning.algorithms.export_record import VALUE
from rlhf_lightning.algorithms.reward import RewardModule
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapter_folders import adapter_base
from rlhf_lightning.models.causal_lm import load_causal_lm
from rlhf_lightning.models.finetune import choose_trained
from rlhf_lightning.models.finetune_settings import FineTune
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.scalar_lm import (
    ScalarLM,
    attach_reward_adapter,
    has_reward_head,
    load_reward_model,
    new_scalar_lm,
)
from rlhf_lightning.models.sharing import scalar_beside
from rlhf_lightning.models.tokenizer import own_pad_token

PREFIX = "value.model."
"""What the names of the weights of a value model of its own begin with."""


def value_record(path: Any, weights: Iterable[str], said: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its value model, see `algorithms/export_record.py`.

    Args:
        path: of the checkpoint.
        weights: their names.
        said: what it says for exports.

    Raises:
        UserError: there is no value model, it is a head on the policy, or the checkpoint is too old to say.
    """
    names = [name for name in weights if name.startswith("value.")]
    if not names:
        raise UserError(f"'{path}' holds no value model: only PPO trains one; leave out --part value")
    if not any(name.startswith(PREFIX) for name in names):
        raise UserError(
            f"'{path}' has a value head on the policy's own hidden states (value_trunk: policy), which is no model by "
            "itself; leave out --part value for the policy"
        )
    record: dict[str, Any] | None = said.get(VALUE)
    if record is None:
        raise UserError(
            f"'{path}' is of an earlier version of this package, which did not say what its value model began as: "
            "resume it with --ckpt_path, and export what that saves"
        )
    return record


class ValueStage(RewardModule):
    """A value model in the place of a reward model.

    Args:
        base: folder or hub id of what it began as.
        beside: that is an adapter, on weights that the policy stands on, too.
        finetune: which weights were trained.
        trust_remote_code: run Python code that comes with the base.
        weights: what the labels of the base count, where it has several.
    """

    def __init__(
        self,
        base: str,
        beside: bool,
        finetune: FineTune,
        trust_remote_code: bool,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(base, finetune=finetune, trust_remote_code=trust_remote_code)
        self._beside, self._weights = beside, weights

    def load_models(self) -> None:
        """Load what the value model began as, with its adapters."""
        value = self._loaded()
        # The probe is a score of the reward model, which this is no longer.
        value.calibration = replace(value.calibration, probe_ids=[], probe_score=0.0)
        size = value.model.get_input_embeddings().num_embeddings
        pad = own_pad_token(self.tokenizer, size)
        value.model.config.pad_token_id = pad if pad < size else None  # without one transformers refuses to guess
        self.scalar = value

    def _loaded(self) -> ScalarLM:
        base, trust = self.model_name_or_path, self.trust_remote_code
        if self._beside:
            policy = load_causal_lm(adapter_base(base), trust_remote_code=trust)
            choose_trained(policy, self.finetune)
            return attach_reward_adapter(scalar_beside(policy).model, base, trainable=True, weights=self._weights)
        if not has_reward_head(base) and self.finetune.mode == "lora":
            policy = load_causal_lm(base, trust_remote_code=trust)
            choose_trained(policy, self.finetune)
            value = scalar_beside(policy)
        elif not has_reward_head(base):
            value = new_scalar_lm(base, head="zero", trust_remote_code=trust)
        else:
            value = load_reward_model(base, trust_remote_code=trust, weights=self._weights)
        choose_trained(value.model, self.finetune)
        add_adapter(value.model, self.finetune, "value")
        return value
