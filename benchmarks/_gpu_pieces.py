"""Two pieces of a training step by themselves: the optimizer, and the output layer with its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _gpu_peaks import Peaks
from _gpu_settings import Part, Result, Settings, best_seconds
from _synthetic import new_model
from measuring import GIB, device_peak_memory, table

WAYS: dict[str, dict[str, Any]] = {"as torch comes": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
TOKENS = 8192
TINY_TOKENS = 128


def optimizer(name: str, settings: Settings) -> Result:
    """AdamW on the weights of the model: seconds of a step in each way, and the bytes that it must read and write."""
    from rlhf_lightning.training.optim import parameter_groups

    model = new_model(settings.shape(), settings.device).to(settings.weight_dtype)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    seconds = {}
    for title, options in WAYS.items():
        adamw = torch.optim.AdamW(parameter_groups(model), lr=1e-5, **options)
        seconds[title] = best_seconds(adamw.step)
    # Weight, gradient and two moments are read, weight and moments written.
    moved = 7 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {"seconds": seconds, "bytes": moved}


def head_ways(model: Any, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Ours, and logits of all tokens at once; each returns what is differentiated.

    Args:
        model: a language model.
        hidden: `[1, N, D]`.
        targets: `[1, N]`.
    """
    from rlhf_lightning.forward.output_layer import cross_entropy_at, token_logprobs_at

    everywhere = torch.ones_like(targets, dtype=torch.bool)
    return {
        "cross-entropy": lambda: cross_entropy_at(model, hidden, targets, everywhere)[0],
        "log-probabilities": lambda: token_logprobs_at(model, hidden[0], targets[0], 1.0, False)[0].sum(),
        "cross-entropy of all logits": lambda: torch.nn.functional.cross_entropy(
            model.get_output_embeddings()(hidden[0]).float(), targets[0], reduction="sum"
        ),
    }


def head(name: str, settings: Settings) -> Result:
    """Forward and backward pass of the output layer, by the size of the vocabulary."""
    found = []
    tokens, device = TINY_TOKENS if settings.tiny else TOKENS, settings.device
    for size in ("0.5B", "0.5B-152k"):
        shape = settings.shape(size)
        model = new_model(shape._replace(layers=1), device).to(settings.weight_dtype)
        hidden = torch.randn(1, tokens, shape.hidden, device=device, dtype=settings.weight_dtype, requires_grad=True)
        targets = torch.randint(shape.vocabulary, (1, tokens), device=device)
        for title, way in head_ways(model, hidden, targets).items():
            seconds, memory = pass_of(way, settings)
            flops = 6 * tokens * shape.hidden * shape.vocabulary
            found.append(
                {"way": title, "words": shape.vocabulary, "seconds": seconds, "flops": flops, "memory": memory}
            )
            model.zero_grad()
            hidden.grad = None
    return {"ways": found, "tokens": tokens}


def pass_of(way: Callable[[], torch.Tensor], settings: Settings) -> tuple[float, int]:
    """Seconds of a forward and backward pass, and what it holds on the device beside what was there."""

    def both() -> None:
        with settings.autocast():
            loss = way()
        loss.backward()

    both()  # the gradients are there from now on
    if settings.device == "cpu":
        return best_seconds(both), 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return best_seconds(both), device_peak_memory() - before


PARTS = {"optimizer": Part(optimizer, ()), "head": Part(head, ())}


def tell(results: dict[str, Result], peaks: Peaks) -> str:
    """A table of each."""
    text = []
    if "optimizer" in results:
        result = results["optimizer"]
        rows = [
            [way, f"{1e3 * seconds:.2f}", f"{result['bytes'] / seconds / 1e9 / peaks.bandwidth:.1%}"]
            for way, seconds in result["seconds"].items()
        ]
        text.append(table(["one step of AdamW", "ms", "of the bandwidth"], rows))
    if "head" in results:
        rows = [
            [
                f"{each['way']}, {each['words']:,} words",
                f"{1e3 * each['seconds']:.2f}",
                f"{each['flops'] / each['seconds'] / 1e12:.3g}",
                f"{each['flops'] / each['seconds'] / 1e12 / peaks.tflops:.1%}",
                f"{each['memory'] / GIB:.2f} GiB" if each["memory"] else "",
            ]
            for each in results["head"]["ways"]
        ]
        first = f"output layer, {results['head']['tokens']:,} tokens"
        text.append(table([first, "ms", "TFLOP/s", "of the peak", "memory beside weights and gradients"], rows))
    return "\n".join(text)
