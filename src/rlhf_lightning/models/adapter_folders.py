"""PEFT adapter folders: what they stand on, and merging them into it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.folders import looks_local, read_config, say_base
from rlhf_lightning.models.peft_library import PeftModel, without_bitsandbytes
from rlhf_lightning.models.tokenizer import load_tokenizer
from rlhf_lightning.training.sharded import is_sharded, widen_now

ADAPTER_CONFIG = "adapter_config.json"
CALIBRATION_FILE = "reward_calibration.json"
"""File of a reward model's adapter folder that holds its calibration."""


def is_adapter(name: str) -> bool:
    """Whether a name means a local folder that holds an adapter rather than a model."""
    return (Path(name) / ADAPTER_CONFIG).is_file()


def is_reward_adapter(name: str) -> bool:
    """Whether a local folder holds the adapter and the head of a classifier."""
    return is_adapter(name) and read_config(name, ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"


def adapter_base(name: str) -> str:
    """The model that an adapter folder was trained on; a relative path starts at the working folder, else at it.

    Args:
        name: an adapter folder.

    Raises:
        UserError: the base is not named, missing, or an adapter itself.
    """
    recorded = read_config(name, ADAPTER_CONFIG).get("base_model_name_or_path")
    if not recorded or not isinstance(recorded, str):
        raise UserError(f"'{Path(name) / ADAPTER_CONFIG}' has no base_model_name_or_path; add the adapter's base model")
    places = [os.path.expanduser(recorded), os.path.join(name, recorded)]
    base = next((place for place in places if os.path.isdir(place)), places[0])
    if looks_local(base) and not os.path.isdir(base):
        raise UserError(
            f"the base model of adapter '{name}' is missing: there is no folder '{recorded}' here or in the adapter's "
            f"folder; fix base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    if is_adapter(base):
        raise UserError(f"the base model of adapter '{name}' is an adapter itself ('{base}'); merge that one first")
    say_base(name, base)
    return base


def fit_tokenizer(model: PreTrainedModel, name: str, trust_remote_code: bool = False) -> None:
    """Give a base model room for the tokens that an adapter's tokenizer has beyond it, and its pad token.

    Args:
        model: changed in place.
        name: the adapter folder; nothing to do if it has no tokenizer.
        trust_remote_code: allow the folder to run Python code of its own.
    """
    if not (Path(name) / "tokenizer_config.json").is_file():
        return
    tokenizer = load_tokenizer(name, trust_remote_code)
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        widen_now(embeddings)
        model.resize_token_embeddings(len(tokenizer))
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id


def merge_adapter(model: PreTrainedModel, name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Add an adapter to the weights of its base, and replace the modules that it holds as a whole.

    Args:
        model: the base, which must not be used any more.
        name: the adapter folder.
        trust_remote_code: allow the folder to run Python code of its own.

    Returns:
        A plain model.

    Raises:
        UserError: the weights are sharded (ZeRO-3).
        ValueError: the adapter does not fit.
    """
    if is_sharded(model):
        raise UserError(f"'{name}' is a PEFT adapter, which cannot be merged on ZeRO-3: merge and save it before")
    widen_now(model)
    fit_tokenizer(model, name, trust_remote_code)
    with warnings.catch_warnings(), without_bitsandbytes():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, over what peft looks at
        warnings.filterwarnings("error", "Found missing adapter keys", UserWarning)
        try:
            adapted: Any = PeftModel.from_pretrained(model, name)
        except UserWarning as e:
            raise ValueError(f"its adapter does not fit its base ({str(e)[:200]})") from e
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.requires_grad_(True)  # peft has frozen it


def folder_config(name: str) -> PretrainedConfig | None:
    """The config of the model in a local folder, or of the base of the adapter there; None where there is neither.

    Args:
        name: a folder, or anything else.
    """
    if is_adapter(name):
        name = adapter_base(name)
    if not (raw := read_config(name)):
        return None
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception:  # code of its own, which is not run to look up a number
        config = PretrainedConfig.from_dict(raw)
    return config
