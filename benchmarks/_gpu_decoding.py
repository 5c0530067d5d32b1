"""Sampling by ours, compiled and as it is, by plain `generate`, by continuous batching and by vLLM.

Reading the prompts and drawing the first token is measured apart; rates are those of the tokens after it. `decoding`
computes as PPO does, which under `bf16-mixed` is autocast over float32 weights, `decoding-bf16` with bfloat16 weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from _gpu_peaks import Peaks
from _gpu_peers import vllm_engine
from _gpu_ppo import compiling_failed
from _gpu_process import need
from _gpu_settings import Part, Result, Settings
from _synthetic import Shape, prompt_batches
from measuring import median, synchronize, table

MORE = 4
"""By which there are more prompts in the parts with 256."""

RUNS = 2
PLAIN = "plain `generate`"
Seconds = tuple[float | None, float]
"""Until the first token of all prompts, None where that says nothing, and until the last."""


class Prompts(NamedTuple):
    """What is answered.

    Attributes:
        ids: `[B, P]`, padded on the left.
        mask: `[B, P]`, bool.
        new: tokens of each answer.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    new: int

    def sampling(self, new: int) -> Any:
        """Answers of so many tokens."""
        from rlhf_lightning import Sampling

        return Sampling(max_new_tokens=new, min_new_tokens=new)


def by_callback(engine: Any, prompts: Prompts) -> tuple[float, float]:
    """One run of ours, which says when the first token is there."""
    stamps: list[float] = []

    def on_token(done: int) -> None:
        if not stamps:
            synchronize()
            stamps.append(time.perf_counter())

    synchronize()
    began = time.perf_counter()
    engine.generate(prompts.ids, prompts.mask, prompts.sampling(prompts.new), on_token=on_token)
    synchronize()
    return stamps[0] - began, time.perf_counter() - began


def by_two_runs(generate: Callable[[int], Any], new: int) -> tuple[float, float]:
    """A run of one token, and one of all, of what does not say when the first is there."""
    ends = []
    for tokens in (1, new):
        synchronize()
        began = time.perf_counter()
        generate(tokens)
        synchronize()
        ends.append(time.perf_counter() - began)
    return ends[0], ends[1]


def plain(model: Any, prompts: Prompts) -> Callable[[int], Any]:
    """transformers' `generate`, told to sample from the model's own distribution."""

    @torch.no_grad()
    def generate(new: int) -> Any:
        lengths = {"min_new_tokens": new, "max_new_tokens": new}
        mask = prompts.mask.long()
        return model.generate(prompts.ids, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0, **lengths)

    return generate


def continuous(model: Any, prompts: Prompts) -> Callable[[int], Any]:
    """transformers' continuous batching, which is left with its own choices but for memory."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    rows = [row[kept].tolist() for row, kept in zip(prompts.ids, prompts.mask, strict=True)]
    share = ContinuousBatchingConfig(max_memory_percent=0.3 if model.device.type == "cuda" else 0.05)  # allocated whole

    @torch.no_grad()
    def generate(new: int) -> Any:
        lengths = {"max_new_tokens": new, "eos_token_id": -1, "pad_token_id": 0}
        answers = model.generate_batch(
            rows, GenerationConfig(do_sample=True, top_k=0, **lengths), share, progress_bar=False
        )
        found = {len(answer.generated_tokens) for answer in answers.values()}
        if len(answers) != len(rows) or found != {new}:
            raise RuntimeError(f"{len(answers)} of {len(rows)} prompts were answered, with {sorted(found)} tokens")

    return generate


def measured(way: Callable[[], tuple[float, float]]) -> Seconds:
    """The medians of several runs."""
    firsts, wholes = zip(*(way() for _ in range(RUNS)), strict=True)
    return median(firsts), median(wholes)


def shape_of(name: str, settings: Settings) -> Shape:
    """With as many prompts as a part answers."""
    shape = settings.shape()
    return shape._replace(prompts=MORE * shape.prompts) if "-256" in name else shape


def prompts_of(shape: Shape, device: str) -> Prompts:
    """One batch of prompts."""
    batch = prompt_batches(shape, 1)[0]
    return Prompts(batch.prompt_ids.to(device), batch.prompt_mask.to(device), shape.new_tokens)


def ours(model: Any, tokenizer: Any, prompts: Prompts, compiled: bool) -> tuple[Seconds | None, str]:
    """Our engine, and why it was not compiled if it should have been."""
    from rlhf_lightning.generation.engine import TransformersEngine

    engine = TransformersEngine(model, tokenizer, compiled=compiled)
    by_callback(engine, prompts)  # tries the model, and compiles
    if compiled and (reason := compiling_failed(engine)):
        return None, reason
    return measured(lambda: by_callback(engine, prompts)), ""


def load(settings: Settings, dtype: torch.dtype) -> tuple[Any, Any]:
    """The policy for inference, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from rlhf_lightning.models.tokenizer import load_tokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(settings.policy(), dtype=dtype)
    return model.to(settings.device).eval(), load_tokenizer(settings.policy())


def decoding(name: str, settings: Settings) -> Result:
    """Ours and transformers' own."""
    halved, shape = name.endswith("-bf16"), shape_of(name, settings)
    model, tokenizer = load(settings, torch.bfloat16 if halved else settings.weight_dtype)
    prompts = prompts_of(shape, settings.device)
    found: dict[str, Seconds] = {}
    notes = []
    with nullcontext() if halved else settings.autocast():
        for title, compiled in (("ours", False), ("ours, compiled", True)):
            seconds, reason = ours(model, tokenizer, prompts, compiled)
            notes += [f"{name}, {title}: {reason}"] if reason else []
            found |= {title: seconds} if seconds else {}
        found[PLAIN] = measured(lambda: by_two_runs(plain(model, prompts), prompts.new))
    size = 2 if halved else torch.finfo(settings.product_dtype).bits // 8
    return {"rows": [row_of(*each, shape, prompts, model, size) for each in found.items()], "notes": notes}


def by_continuous(name: str, settings: Settings) -> Result:
    """Continuous batching, whose time to the first token is that of setting it up, in each run."""
    model, _ = load(settings, torch.bfloat16)
    shape = shape_of(name, settings)
    prompts = prompts_of(shape, settings.device)
    generate = continuous(model, prompts)
    _, whole = by_two_runs(generate, prompts.new)
    return {"rows": [row_of("`generate_batch`", (None, whole), shape, prompts, model, 2)]}


def by_vllm(name: str, settings: Settings) -> Result:
    """vLLM in this process, on the same weights in bfloat16."""
    need("vllm")
    model, tokenizer = load(settings, torch.bfloat16)
    shape = shape_of(name, settings)
    prompts = prompts_of(shape, settings.device)
    engine = vllm_engine(model, tokenizer, shape.prompt_length + shape.new_tokens)

    def generate(new: int) -> None:
        answers = engine.generate(prompts.ids, prompts.mask, prompts.sampling(new))
        if answers.response_ids.shape[1] != new:
            raise RuntimeError(f"answers have {answers.response_ids.shape[1]} tokens instead of {new}")

    generate(prompts.new)  # takes over the weights
    seconds = measured(lambda: by_two_runs(generate, prompts.new))
    engine.close()
    return {"rows": [row_of("vLLM", seconds, shape, prompts, model, 2)]}


def row_of(title: str, seconds: Seconds, shape: Shape, prompts: Prompts, model: Any, size: int) -> dict[str, Any]:
    """What one way came to.

    Args:
        title: of the way.
        seconds: until the first token and the last.
        shape: of the model, with as many prompts as were answered.
        prompts: that were answered.
        model: whose weights were read.
        size: bytes of a number in matrix products.
    """
    first, whole = seconds
    # Of a try both may be the same but for the noise.
    each = None if first is None or first >= whole else (whole - first) / (prompts.new - 1)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    cached = shape.cache_elements * (float(prompts.mask.sum()) + shape.prompts * prompts.new / 2)
    return {
        "way": title,
        "prompts": shape.prompts,
        "first": first,
        "tokens_per_second": each and shape.prompts / each,
        "bytes_per_second": each and (weights + cached) * size / each,
        "in_all": shape.prompts * prompts.new / whole,
    }


PARTS = {
    **{name: Part(decoding) for name in ("decoding", "decoding-256", "decoding-bf16", "decoding-256-bf16")},
    "continuous": Part(by_continuous),
    **{name: Part(by_vllm) for name in ("vllm", "vllm-256")},
}


def tell(results: dict[str, Result], peaks: Peaks) -> str:
    """One table."""
    rows = []
    for part, result in results.items():
        base = next((row["tokens_per_second"] for row in result["rows"] if row["way"] == PLAIN), None)
        for row in result["rows"]:
            rate, read, first = row["tokens_per_second"], row["bytes_per_second"], row["first"]
            rows.append(
                [
                    f"{part}: {row['way']}",
                    f"{row['prompts']}",
                    f"{rate:,.0f}" if rate else "",
                    f"{rate / base:.2f}" if rate and base else "",
                    f"{read / 1e9 / peaks.bandwidth:.1%}" if read else "",
                    f"{1e3 * first:,.1f}" if first else "",
                    f"{row['in_all']:,.0f}",
                ]
            )
    head = ["answers by", "prompts", "new tokens/s after the first", "to plain `generate`", "of the bandwidth"]
    return table([*head, "ms to the first", "new tokens/s in all"], rows)
