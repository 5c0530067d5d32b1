"""A transformer with a scalar head: the reward model and the value model.

It is Hugging Face's own `...ForSequenceClassification(num_labels=1)` inside, so what is saved loads in plain
transformers. Notation: B batch, T padded length.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.arguments import check_arguments
from rlhf_lightning.errors import UserError
from rlhf_lightning.forward.backbone import HEAD
from rlhf_lightning.forward.hidden import ResponseRows, hidden_states, response_hidden
from rlhf_lightning.functional import ScoreCombination, combine_scores, scores_at_end
from rlhf_lightning.models.adapter_folders import (
    adapter_base,
    is_adapter,
    is_reward_adapter,
)
from rlhf_lightning.models.calibration import CALIBRATION, Calibration, as_record, restore_records
from rlhf_lightning.models.classifiers import check_linear_head, draw_head, load_classifier
from rlhf_lightning.models.folders import architectures, check_model_folder, read_config, reason_of
from rlhf_lightning.models.fused_lora import fuse_adapters
from rlhf_lightning.models.heads import HeadEnsemble, linear_in_float32, load_ensemble
from rlhf_lightning.models.labels import config_of, fold_head, label_weights, labels_of
from rlhf_lightning.models.peft_library import (
    PeftConfig,
    cast_adapter_dtype,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from rlhf_lightning.training.sharded import dtype_ahead, is_sharded


class ScalarLM(nn.Module):
    """One calibrated scalar per token: `(raw - mean) / std`.

    The raw scalar is what plain transformers computes from the same folder. Mean and standard deviation are those of
    held-out chosen responses, found at the end of reward training and kept in the model's config; a model without them
    has mean 0 and standard deviation 1.

    Args:
        model: a Hugging Face sequence classifier with one label and a head named `score`.
        ensemble: several heads, the mean of which that one is.

    Attributes:
        combination: what `scores` makes of those of several heads.
    """

    ensemble: HeadEnsemble | None

    def __init__(self, model: PreTrainedModel, ensemble: HeadEnsemble | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.ensemble = ensemble
        self.combination: ScoreCombination = "mean"

    @property
    def calibration(self) -> Calibration:
        """Scale of the raw scores."""
        return Calibration(**(getattr(self.model.config, CALIBRATION, None) or {}))

    @calibration.setter
    def calibration(self, calibration: Calibration) -> None:
        setattr(self.model.config, CALIBRATION, as_record(calibration))

    def raw(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scalar of every token, `[B, T]`, float32.

        Args:
            input_ids: `[B, T]`, int64.
            attention_mask: True for real tokens, `[B, T]`, bool, padded on either side.
        """
        return self.head(hidden_states(self.model, input_ids, attention_mask))

    def head(self, hidden: Tensor) -> Tensor:
        """Raw scalar from hidden states: `[..., D]` to `[...]`, float32."""
        return linear_in_float32(self.model.score, hidden).squeeze(-1)

    def heads(self, hidden: Tensor) -> Tensor:
        """Raw scalars of all heads, `[..., D]` to `[..., K]`, float32; K is 1 without an ensemble."""
        mean = self.head(hidden).unsqueeze(-1)
        return mean if self.ensemble is None else mean + self.ensemble(hidden)

    def combined(self, hidden: Tensor) -> Tensor:
        """One raw scalar of all heads, as `combination` says: `[..., D]` to `[...]`, float32."""
        return self.head(hidden) if self.combination == "mean" else combine_scores(self.heads(hidden), self.combination)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Calibrated scalar of every token, `[B, T]`, float32; arguments as for `raw`."""
        return self.calibrate(self.raw(input_ids, attention_mask))

    def calibrate(self, raw: Tensor) -> Tensor:
        """Raw to calibrated scalars, any shape."""
        calibration = self.calibration
        return (raw - calibration.mean) / calibration.std

    def scores(self, input_ids: Tensor, attention_mask: Tensor, rows: ResponseRows | None = None) -> Tensor:
        """Calibrated score of each sequence, read at its last real token, of several heads combined, `[B]`, float32.

        Args:
            input_ids: as for `raw`.
            attention_mask: likewise.
            rows: the same sequences, as they are to go through the model; None for each by itself.
        """
        if rows is not None:
            return self.calibrate(self.combined(rows.last_hidden(self.model)))
        if self.combination == "mean":
            return scores_at_end(self(input_ids, attention_mask), attention_mask)
        hidden = hidden_states(self.model, input_ids, attention_mask)
        return scores_at_end(self.calibrate(self.combined(hidden)), attention_mask)

    @torch.no_grad()
    def probe_error(self) -> float:
        """How far the probe's score is now from what it was when the model was saved, in standard deviations."""
        calibration = self.calibration
        if not calibration.probe_ids:
            return 0.0
        ids = torch.tensor([calibration.probe_ids], device=self.model.device)
        score = scores_at_end(self.raw(ids, torch.ones_like(ids, dtype=torch.bool)), torch.ones_like(ids).bool())
        return abs(float(score) - calibration.probe_score) / calibration.std


def new_scalar_lm(
    name_or_path: str | os.PathLike[str],
    head: Literal["normal", "zero"] = "normal",
    dropout: bool = False,
    trust_remote_code: bool = False,
) -> ScalarLM:
    """Put a fresh scalar head, without bias, on a language model.

    Args:
        name_or_path: folder or hub id of a language model, usually the export of the SFT stage, or folder of a PEFT
            adapter, which is merged into its base first.
        head: `normal` draws the head with standard deviation 1/sqrt(d + 1) (Stiennon et al. 2020, appendix B.1);
            `zero` makes every scalar 0 at first (a value model that starts without an opinion).
        dropout: keep the dropout that the model's config asks for.
        trust_remote_code: allow the folder to run Python code of its own.

    Raises:
        UserError: there is no model at that place, or its family has no classifier in transformers.
    """
    check_arguments(new_scalar_lm, {"head": head})
    name = check_model_folder(name_or_path)
    scalar = ScalarLM(load_classifier(name, 1, dropout, trust_remote_code)[0])
    check_linear_head(name, scalar.model)
    draw_head(scalar.model.score, 0.0 if head == "zero" else 1.0)
    scalar.calibration = Calibration()
    return scalar


def has_reward_head(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a local folder holds a classifier, or an adapter with its head, rather than a language model."""
    name = check_model_folder(name_or_path)
    return is_reward_adapter(name) or any("SequenceClassification" in each for each in architectures(name))


def check_reward_model(name_or_path: str | os.PathLike[str], weights: Mapping[str, float] | None = None) -> str:
    """Return the name to load a reward model from, after the checks that need neither weights nor network.

    Args:
        name_or_path: as for `load_reward_model`.
        weights: likewise.

    Raises:
        UserError: as for `load_reward_model`, as far as its config tells.
    """
    name = check_model_folder(name_or_path)
    if _is_language_model(read_config(name)) or (is_adapter(name) and not is_reward_adapter(name)):
        raise _untrained(name)
    if read_config(name) or is_adapter(name):  # what is on the hub alone is looked at when it is loaded
        label_weights(name, labels_of(name), weights)
    return name


def _is_language_model(config: Mapping[str, Any]) -> bool:
    named = config.get("architectures")
    return isinstance(named, list) and any("CausalLM" in str(each) or "LMHead" in str(each) for each in named)


def _untrained(name: str) -> UserError:
    kind = "language model's adapter" if is_adapter(name) else "model"
    return UserError(
        f"'{name}' has no trained reward head (it is a {(architectures(name) or [kind])[0]}); "
        "train one with `rlhf fit --config reward.yaml` and pass its export folder"
    )


def load_reward_model(
    name_or_path: str | os.PathLike[str],
    dropout: bool = False,
    trust_remote_code: bool = False,
    nf4: bool = False,
    weights: Mapping[str, float] | None = None,
) -> ScalarLM:
    """Load a trained reward model with its calibration and its heads; never one whose head is random.

    Args:
        name_or_path: folder or hub id of a sequence classifier with a linear head, or folder of a PEFT adapter with a
            head, which is merged into its base.
        dropout: keep the dropout that the model's config asks for.
        trust_remote_code: allow the folder to run Python code of its own.
        nf4: hold the linear layers of the backbone in four bits; they cannot be trained.
        weights: what the raw logit of each label counts, by its name or number; the score is their weighted sum, and
            a calibration is left out. None for a model of one label.

    Raises:
        UserError: there is no such model, it is a language model without a trained head, or it has several labels and
            no weights.
    """
    name, model, found = load_weighed(name_or_path, dropout, trust_remote_code, nf4, weights)
    check_linear_head(name, model)
    return as_scalar(name, model, found)


def load_weighed(
    name_or_path: str | os.PathLike[str],
    dropout: bool = False,
    trust_remote_code: bool = False,
    nf4: bool = False,
    weights: Mapping[str, float] | None = None,
) -> tuple[str, Any, list[float] | None]:
    """A trained classifier of any family, with the name that it was loaded by and what its logits count.

    Args:
        name_or_path: as for `load_reward_model`.
        dropout: likewise.
        trust_remote_code: likewise.
        nf4: likewise.
        weights: likewise.

    Returns:
        The name, the model, and what `label_weights` says.

    Raises:
        UserError: as for `load_reward_model`, save that its head may be of any kind.
    """
    name = check_reward_model(name_or_path, weights)
    if not is_adapter(name) and _is_language_model(config_of(name)):  # of which no labels need be spoken
        raise _untrained(name)
    labels = labels_of(name, fetch=True)
    found = label_weights(name, labels, weights)
    model, missing = load_classifier(name, len(labels), dropout, trust_remote_code, nf4)
    if any(key.startswith(f"{HEAD}.") for key in missing):
        raise _untrained(name)
    return name, model, found


def as_scalar(name: str, model: Any, weights: list[float] | None) -> ScalarLM:
    """A classifier with a linear head as a model of one scalar; every process must call it.

    Args:
        name: that it was loaded by.
        model: its head is replaced by one that gives the weighted sum, where there are weights.
        weights: of its logits; None for a single one as it is.
    """
    if weights is None:
        return ScalarLM(model, load_ensemble(name, model.score))
    model.score = fold_head(model.score, weights)
    model.config.num_labels = model.num_labels = 1
    scalar = ScalarLM(model)
    scalar.calibration = Calibration()
    return scalar


def reward_adapter_base(name_or_path: str | os.PathLike[str]) -> str | None:
    """The base model's folder or hub id where a local folder holds a reward model's adapter, otherwise None.

    Args:
        name_or_path: folder or hub id of a reward model.
    """
    name = os.path.expanduser(os.fspath(name_or_path))
    return adapter_base(name) if is_reward_adapter(name) else None


def attach_reward_adapter(
    model: PreTrainedModel,
    name_or_path: str | os.PathLike[str],
    trainable: bool = False,
    adapter: str = "default",
    weights: Mapping[str, float] | None = None,
) -> ScalarLM:
    """Put a reward model's adapter and head on its base, without merging: the base's weights may be shared.

    Args:
        model: a sequence classifier with one label that holds the base's weights and no adapter yet; its base is not
            changed and frozen, its head is replaced.
        name_or_path: the adapter folder.
        trainable: whether adapter and head are to be trained.
        adapter: the adapter's name inside the model.
        weights: as for `load_reward_model`.

    Returns:
        The calibrated reward model, all dropout off.

    Raises:
        UserError: the adapter does not fit, or the weights are sharded (ZeRO-3).
    """
    name = check_model_folder(name_or_path)
    if is_sharded(model):
        raise UserError(f"'{name}' is a PEFT adapter, which cannot be loaded on ZeRO-3: merge and save it before")
    try:
        config: Any = PeftConfig.from_pretrained(name)
        config.inference_mode, config.modules_to_save, config.lora_dropout = not trainable, None, 0.0
        held = {key.removeprefix("base_model.model."): t for key, t in load_peft_weights(name, device="cpu").items()}
        if (head := held.pop("score.weight", None)) is None:
            raise ValueError("it has no score.weight")
        untyped: Any = model
        dtype, device = dtype_ahead(untyped.score.weight), untyped.score.weight.device
        untyped.score = nn.Linear(head.shape[1], head.shape[0], bias=False, device=device, dtype=dtype)
        model.requires_grad_(False)
        inject_adapter_in_model(config, model, adapter)
        fuse_adapters(model)
        cast_adapter_dtype(model, adapter)
        loaded: Any = set_peft_model_state_dict(model, held, adapter)
        if lacking := sorted(key for key in loaded.missing_keys if f".{adapter}." in key):
            raise ValueError(f"its weights lack {lacking[0]}")
    except Exception as e:
        raise UserError(f"the reward adapter '{name}' does not fit its base: {reason_of(e)}") from e
    with torch.no_grad():
        untyped.score.weight.copy_(head)
    untyped.score.requires_grad_(trainable)
    restore_records(model.config, name)
    return as_scalar(name, model, label_weights(name, labels_of(name), weights))


def response_values(
    model: ScalarLM,
    sequences: Tensor,
    sequence_mask: Tensor,
    response_mask: Tensor,
    rows: ResponseRows | None = None,
) -> Tensor:
    """Value before each response token, `V(x[<P+r])`, read from the hidden state at P + r - 1.

    Args:
        model: the value model.
        sequences: prompts padded on the left, then responses padded on the right, `[B, P + R]`, int64.
        sequence_mask: True for real tokens, `[B, P + R]`, bool.
        response_mask: True for response tokens, `[B, R]`, bool.
        rows: the same sequences, as they are to go through the model; None for each by itself.

    Returns:
        `[B, R]`, float32, 0 after the last token.
    """
    hidden = response_hidden(model.model, sequences, sequence_mask, response_mask.shape[1], rows)
    return torch.where(response_mask, model.calibrate(model.head(hidden)), 0)
