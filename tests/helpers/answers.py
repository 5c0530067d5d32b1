"""Models of many families, prompts for them, and what they answer."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models import FAMILIES, VOCAB_SIZE, spread_weights, tiny_causal_lm
from rlhf_lightning.generation.engine import TransformersEngine

EOS = 2
LENGTHS = [3, 17, 1, 9, 9, 12, 2, 5, 20, 1, 6, 4]
_GROUPED = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
_HALF_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
OTHERS = {
    "qwen2": ("qwen2", _GROUPED),
    "mistral-window": ("mistral", _GROUPED | {"sliding_window": 4}),
    "gemma3": ("gemma3_text", _GROUPED | _HALF_SLIDING),
    "llama-grouped": ("llama", _GROUPED),
    "llama-wide-heads": ("llama", _GROUPED | {"head_dim": 32}),  # the least that vLLM takes on a CPU
    "qwen3-next": (
        "qwen3_next",
        _GROUPED
        | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0, "linear_num_value_heads": 2}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
}
"""Families that the helpers lack: shared keys, windows on all or some layers, a layer that keeps no keys."""


def model_of(name, seed=3, layers=None):
    """A model of a family, with two layers; `layers` says how many else."""
    model_type, options = FAMILIES.get(name) or OTHERS[name]
    depth = {key: layers for key in ("n_layer", "num_hidden_layers") if layers and key in options}
    if name in FAMILIES:
        return tiny_causal_lm(name, seed, tie_word_embeddings=False, **depth)
    ids = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
    options = ids | {"tie_word_embeddings": False} | options | depth
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **options)
        model = AutoModelForCausalLM.from_config(config).eval()
        spread_weights(model)
    return model


def prompts(lengths=LENGTHS, extra=0):
    """Prompts padded on the left, with `extra` columns more than needed."""
    width = max(lengths) + extra
    ids = (torch.arange(width, 0, -1) * 7 + torch.arange(len(lengths)).unsqueeze(1) * 31) % 250 + 10
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    return ids.masked_fill(~mask, 0), mask


def responses(generation):
    rows = zip(generation.response_ids, generation.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def generate(model, prompt_ids, prompt_mask, sampling, tokenizer, generator=None, **options):
    """All prompts at once, by an engine of their own."""
    engine = TransformersEngine(model, tokenizer)
    return engine.generate(prompt_ids, prompt_mask, sampling, generator=generator, **options)
