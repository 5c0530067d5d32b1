"""All parts of gpu.py, in the order in which they are run and told, and what runs one in its process."""

from __future__ import annotations

import logging
import warnings
from types import ModuleType
from typing import Any

import _gpu_decoding
import _gpu_kernels
import _gpu_layouts
import _gpu_pieces
import _gpu_ppo
import _gpu_training
import torch
from _gpu_settings import Part, Result, Settings
from _synthetic import write_model
from measuring import device_peak_memory, peak_memory

GROUPS: tuple[ModuleType, ...] = (
    _gpu_kernels,
    _gpu_training,
    _gpu_layouts,
    _gpu_pieces,
    _gpu_ppo,
    _gpu_decoding,
)
"""Each has `PARTS`, and `tell`, which makes Markdown of the results of some of them."""

PARTS: dict[str, Part] = {name: part for group in GROUPS for name, part in group.PARTS.items()}
PRELOADED = (
    "torch._dynamo",
    "torch.profiler",
    "transformers.models.llama.modeling_llama",
    "peft",
    "pytorch_lightning",
    "rlhf_lightning.algorithms",
    "rlhf_lightning.generation.engine",
    "_gpu_parts",
)
"""What is imported once for all processes."""


def quiet() -> None:
    """Leave out what libraries say while they train."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def write_models(shapes: list[str], settings: Settings) -> None:
    """Write the models that parts need; a reward model of the first shape only, for PPO.

    Args:
        shapes: by name.
        settings: with the folder.
    """
    prepare(settings)
    for name in shapes:
        write_model(settings.shape(name), settings.models(name), settings.device, with_reward=name == "0.5B")


def prepare(settings: Settings) -> None:
    """Set up a process. In a try on a CPU it has one thread, and the compiler traces without generating code."""
    quiet()
    if not settings.tiny or settings.device != "cpu":
        return
    torch.set_num_threads(1)
    compiling = torch.compile

    def traced(function: Any, mode: str = "default", **options: Any) -> Any:
        return compiling(function, backend="eager", **options)

    torch.compile = traced  # type: ignore[assignment]


def measure(name: str, settings: Settings) -> Result:
    """As `run_part`, in a process that does nothing else."""
    prepare(settings)
    return run_part(name, settings)


def run_part(name: str, settings: Settings) -> Result:
    """Measure one part, in this process.

    Args:
        name: of the part.
        settings: what was asked for.
    """
    torch.manual_seed(0)
    result = PARTS[name].run(name, settings)
    return {**result, "peak": peak_memory(), "device_peak": device_peak_memory()}
