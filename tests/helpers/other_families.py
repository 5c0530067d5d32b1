"""Language models that keep a state, read padding, or are none of ours, each as small as transformers makes it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.models import VOCAB_SIZE, spread_weights

_SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "tie_word_embeddings": False}
_SSM = {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ENCODER = {key: value for key, value in _SHAPE.items() if key not in ("head_dim", "num_key_value_heads")}

RIGHT: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA,
    "mamba2": _MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": _MAMBA,
    "rwkv": _MAMBA | {"attention_hidden_size": 16, "context_length": 64},
    "xlstm": _SHAPE | {"num_heads": 2},
    "recurrent_gemma": _SHAPE
    | {"block_types": ["recurrent", "attention"], "attention_window_size": 4, "lru_width": 16, "logits_soft_cap": 1.0},
    "jamba": _SHAPE
    | {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2}
    | {"num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False},
    "zamba": _SHAPE
    | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
    | {"n_mamba_heads": 2, "mamba_d_state": 4, "use_mamba_kernels": False},
    "bamba": _SHAPE | _SSM | {"attn_layer_indices": [1]},
    "granitemoehybrid": _SHAPE
    | _SSM
    | _EXPERTS
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, "logits_scaling": 4.0},
    "lfm2": _SHAPE | {"layer_types": ["conv", "full_attention"]},
    "minimax": _SHAPE | _EXPERTS | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": _SHAPE
    | {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1}
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "mixtral": _SHAPE | _EXPERTS,
    "gpt_oss": _SHAPE | _EXPERTS | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "openai-gpt": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "afn": "gelu"},
    "bart": {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    | {"max_position_embeddings": 64, "tie_word_embeddings": False},
}
"""Model type and config of those that are right, whatever that costs."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (_ENCODER | {"is_decoder": True}, "its logits are more than its output layer"),
    "modernbert-decoder": (_SHAPE, "its logits are more than its output layer"),
    "camembert": (_ENCODER | {"is_decoder": True}, "it counts positions in a way of its own"),
    "roformer": (_ENCODER, "it is not a causal model"),
    "xlnet": ({"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}, "it is not a causal model"),
    "llama4_text": (_SHAPE | {"num_local_experts": 2}, "it cannot be run without its output layer"),
}
"""Model type, config, and why."""


def other_causal_lm(model_type: str, seed: int = 3) -> PreTrainedModel:
    """A language model in evaluation mode, its logits spread widely enough to tell tokens apart."""
    options = RIGHT[model_type] if model_type in RIGHT else REFUSED[model_type][0]
    ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **ids | options)).eval()
        spread_weights(model)
    return model
