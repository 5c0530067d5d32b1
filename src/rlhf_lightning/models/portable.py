"""Folders that older tools open, too: transformers from 4.51 on reads them as this one does.

transformers 5 writes some settings under other names. 4.51 does not find those, takes its defaults instead, and says
nothing: a model with another rotary base than 10,000 computes something else there. So both names are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer that gives the same ids in transformers 4.51 as here.

    Args:
        tokenizer: not changed.
        folder: of the model.
    """
    tokenizer.save_pretrained(folder)
    _rewrite(folder / "tokenizer_config.json", lambda config: older_tokenizer(config, tokenizer))


def rewrite_config(folder: Path) -> None:
    """Add to a model's `config.json` what transformers 4.51 reads.

    Args:
        folder: as `save_pretrained` left it.
    """
    _rewrite(folder / "config.json", older_config)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = change(json.loads(path.read_text(encoding="utf-8"), object_hook=_plain_float))
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _plain_float(value: dict[str, Any]) -> Any:
    """An infinite number as 4.51 writes and reads it, `Infinity`, for what 5 makes of it."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def older_tokenizer(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `tokenizer_config.json` must hold for transformers 4.51 to read `tokenizer.json` as it stands.

    Args:
        config: as transformers 5 writes it.
        tokenizer: what was written.

    Returns:
        The same for transformers 5, which takes `PreTrainedTokenizerFast` for its `TokenizersBackend`.
    """
    new = dict(config)
    if tokenizer.is_fast and "auto_map" not in config:
        # 4.51 knows no TokenizersBackend; its LlamaTokenizerFast and others put another BOS than tokenizer.json says.
        new["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Defaults of the class: in 4.51 a PreTrainedTokenizerFast also gives token_type_ids, which most models refuse.
    new["model_input_names"] = list(tokenizer.model_input_names)
    new["padding_side"], new["truncation_side"] = tokenizer.padding_side, tokenizer.truncation_side
    new["clean_up_tokenization_spaces"] = bool(tokenizer.clean_up_tokenization_spaces)
    if isinstance(extra := new.pop("extra_special_tokens", None), list):  # a dict of named ones in 4.51
        new["additional_special_tokens"] = extra
    return new


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model under the names of transformers 4.51 beside those of 5; both say the same.

    Args:
        config: as transformers 5 writes it.
    """
    new = dict(config)
    if "dtype" in config:
        new["torch_dtype"] = config["dtype"]
    if rope := config.get("rope_parameters"):
        new |= _older_rope(rope, config)
    if config.get("model_type") == "qwen3_moe":
        new["num_experts"] = config.get("num_local_experts", config.get("num_experts"))
    layers = config.get("layer_types") or []
    if {"sliding_attention", "full_attention"} <= set(layers):
        new["sliding_window_pattern"] = layers.index("full_attention") + 1
    return new


def _older_rope(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Base, share and scaling of the rotary positions; Gemma 3 has those of two kinds of layers."""
    older: dict[str, Any] = {}
    if local := rope.get("sliding_attention"):
        older["rope_local_base_freq"] = local.get("rope_theta")
        rope = rope.get("full_attention") or local
    neox = str(config.get("model_type")).startswith("gpt_neox")
    names = ("rotary_emb_base", "rotary_pct") if neox else _NOT_SCALING
    older |= {old: rope[new] for old, new in zip(names, _NOT_SCALING, strict=True) if new in rope}
    scaling = {name: value for name, value in rope.items() if name not in _NOT_SCALING}
    if scaling.get("rope_type", "default") == "default":
        return older
    if scaling.get("original_max_position_embeddings") == config.get("max_position_embeddings"):
        # 4.51 would take their quotient, 1, for the factor of YaRN; without it, both take max_position_embeddings.
        scaling.pop("original_max_position_embeddings", None)
    if config.get("model_type") == "phi3":  # 4.51 refuses any other key
        factors = {name: value for name, value in scaling.items() if name in ("short_factor", "long_factor")}
        scaling = {"type": scaling["rope_type"]} | factors
    return older | {"rope_scaling": scaling}
