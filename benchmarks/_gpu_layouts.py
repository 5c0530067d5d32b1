"""SFT of the same examples in several layouts, with cuDNN's attention and without: padded, unpadded, packed.

All ways are taken one after the other in one training run, of `steps` steps each. Padding is computed where the package
is told that it cannot leave it out. Packed rows are read without padding, too, as ours are.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from _gpu_peaks import Peaks
from _gpu_settings import Hook, Part, Result, Settings, fit
from _gpu_training import known, rates, real_tokens
from _synthetic import instruction_batches, packed
from measuring import GIB, device_peak_memory, table

ROWS_OF = (4, 8)
"""Lengths of packed rows, in longest examples: 2,048 and 4,096 tokens."""


class Way(NamedTuple):
    """One way to train.

    Attributes:
        layout: how the examples lie in their rows.
        pads: padding is computed.
        cudnn: cuDNN's attention is allowed; None where there is none.
    """

    layout: str
    pads: bool
    cudnn: bool | None

    @property
    def title(self) -> str:
        """As it is shown."""
        return self.layout + {None: "", True: ", cuDNN on", False: ", cuDNN off"}[self.cudnn]


def switching(ways: list[Way], steps: int, peaks: dict[str, int]) -> tuple[Hook, Hook]:
    """What is to be done before and after each step.

    Args:
        ways: that are taken, one after the other.
        steps: of each.
        peaks: of the device's memory, by way; filled.
    """
    from rlhf_lightning.forward import hidden

    can_unpad = hidden.can_unpad

    def before(step: int) -> None:
        way = ways[step // steps]
        hidden.can_unpad = (lambda *_: False) if way.pads else can_unpad
        if way.cudnn is not None:  # which the package switches off when it first uses a model
            torch.backends.cuda.enable_cudnn_sdp(way.cudnn)
            if step % steps == 0:
                torch.cuda.reset_peak_memory_stats()

    def after(step: int) -> None:
        peaks[ways[step // steps].title] = device_peak_memory()

    return before, after


def layouts(name: str, settings: Settings) -> Result:
    """Train in every way."""
    from rlhf_lightning import SFTModule
    from rlhf_lightning.forward import hidden

    shape = settings.shape()
    plain, work = instruction_batches(shape, settings.steps)
    batches: dict[str, list[Any]] = {"padded": plain, "unpadded": plain}
    for length in (times * shape.max_length for times in ROWS_OF):
        batches[f"packed in rows of {length:,}"] = [packed(batch, length) for batch in plain]
    cudnn = (False, True) if settings.device == "cuda" else (None,)
    ways = [Way(layout, layout == "padded", allowed) for layout in batches for allowed in cudnn]
    module = SFTModule(
        settings.policy(),
        lr_schedule="constant",
        warmup_steps=0,
        **known(SFTModule, max_tokens_per_batch=shape.micro_tokens),
    )
    peaks: dict[str, int] = {}
    with mock.patch.object(hidden, "can_unpad", hidden.can_unpad):  # put back in the end
        hooks = switching(ways, settings.steps, peaks)
        seconds, _ = fit(module, [batch for way in ways for batch in batches[way.layout]], settings, *hooks)
    found = {}
    for number, way in enumerate(ways):
        own = seconds[number * settings.steps : (number + 1) * settings.steps]
        tokens = [*map(real_tokens, batches[way.layout])]
        found[way.title] = {**rates(own, tokens, work, settings.warmup), "memory": peaks[way.title]}
    return {"ways": found}


PARTS = {"layouts": Part(layouts)}


def tell(results: dict[str, Result], peaks: Peaks) -> str:
    """One table."""
    rows = [
        [
            title,
            f"{way['seconds']:.3f}",
            f"{way['tokens_per_second']:,.0f}",
            f"{way['flops_per_second'] / 1e12 / peaks.tflops:.1%}",
            f"{way['memory'] / GIB:.2f} GiB" if way["memory"] else "",
        ]
        for title, way in results["layouts"]["ways"].items()
    ]
    return table(["layout of SFT", "seconds a step", "real tokens/s", "of the peak", "peak memory"], rows)
