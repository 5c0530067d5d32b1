"""SFT and the reward model by size of model and vocabulary: tokens a second and model FLOP utilisation."""

from __future__ import annotations

from typing import Any

from _gpu_peaks import Peaks
from _gpu_peers import sft_by_trl
from _gpu_settings import Part, Result, Settings, fit, memory_text
from _synthetic import Work, instruction_batches, preference_batches
from measuring import arguments_of, median, steady, table

SIZES = {"": "0.5B", "152k": "0.5B-152k", "1b": "1B"}
MASKS = ("attention_mask", "chosen_mask", "rejected_mask")


def known(module: type, **wanted: Any) -> dict[str, Any]:
    """Those arguments that the module has."""
    names = arguments_of(module)
    return {name: value for name, value in wanted.items() if name in names}


def real_tokens(batch: Any) -> int:
    """Tokens of a batch without its padding."""
    return sum(int(getattr(batch, name).sum()) for name in MASKS if hasattr(batch, name))


def rates(seconds: list[float], tokens: list[int], work: list[Work], warmup: int) -> Result:
    """What the steps that count got done.

    Args:
        seconds: of each step.
        tokens: real ones of each.
        work: of each.
        warmup: first steps that do not count.
    """
    spent = sum(steady(seconds, warmup))
    return {
        "seconds": median(steady(seconds, warmup)),
        "tokens_per_second": sum(steady(tokens, warmup)) / spent,
        "flops_per_second": sum(steady([each.flops for each in work], warmup)) / spent,
        "unhalved_per_second": sum(steady([each.unhalved for each in work], warmup)) / spent,
    }


def supervised(name: str, settings: Settings) -> Result:
    """SFT or the reward model."""
    from rlhf_lightning import RewardModule, SFTModule
    from rlhf_lightning.forward.compiled_layers import uncompiled_reason

    stage, _, size = name.removesuffix("-compiled").partition("-")
    shape = settings.shape(SIZES[size])
    kind: Any = SFTModule if stage == "sft" else RewardModule
    batches, work = (instruction_batches if stage == "sft" else preference_batches)(shape, settings.steps)
    compiled = name.endswith("-compiled")
    arguments = known(kind, max_tokens_per_batch=shape.micro_tokens, compile=compiled)
    module = kind(settings.policy(SIZES[size]), lr_schedule="constant", warmup_steps=0, **arguments)
    seconds, _ = fit(module, batches, settings)
    notes = [f"{name}: the first step took {seconds[0]:.0f} s"] if compiled else []
    if reason := uncompiled_reason(module.export_model):
        notes = [f"{name}: its layers were not compiled: {reason}"]
    return {**rates(seconds, [*map(real_tokens, batches)], work, settings.warmup), "notes": notes}


def by_trl(name: str, settings: Settings) -> Result:
    """SFT of the same rows by TRL."""
    batches, work = instruction_batches(settings.shape(), settings.steps)
    seconds, note = sft_by_trl(batches, settings)
    return {**rates(seconds, [*map(real_tokens, batches)], work, settings.warmup), "notes": [f"{name}: {note}"]}


PARTS = {
    **{
        f"{stage}-{size}".rstrip("-"): Part(supervised, (shape,))
        for size, shape in SIZES.items()
        for stage in ("sft", "reward")
    },
    **{f"{stage}-compiled": Part(supervised, ("0.5B",)) for stage in ("sft", "reward")},
    "sft-trl": Part(by_trl),
}


def tell(results: dict[str, Result], peaks: Peaks) -> str:
    """One table."""
    rows = [
        [
            part,
            f"{result['seconds']:.3f}",
            f"{result['tokens_per_second']:,.0f}",
            f"{result['flops_per_second'] / 1e12:.3g}",
            f"{result['flops_per_second'] / 1e12 / peaks.tflops:.1%}",
            f"{result['unhalved_per_second'] / 1e12 / peaks.tflops:.1%}",
            memory_text(result),
        ]
        for part, result in results.items()
    ]
    head = [
        "training",
        "seconds a step",
        "real tokens/s",
        "TFLOP/s",
        "of the peak",
        "attention unhalved",
        "peak memory",
    ]
    return table(head, rows)
