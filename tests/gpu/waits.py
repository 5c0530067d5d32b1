"""On a GPU, too, a step makes the host wait for the device as seldom as is claimed.

    PYTHONPATH=src python tests/gpu/waits.py [--device cpu]

Needs torch, transformers, pytorch-lightning, peft, jsonargparse and protobuf. Prints how often, and at which lines, and
ends with 1 if one of the numbers is above its limit.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _gpu_kernels import syncs
from _gpu_settings import Settings
from _synthetic import write_model

LIMITS = {"one SFT step": 2, "one reward-model step": 2, "one PPO iteration": 8, "16 decoded tokens": 2}
"""By what is run: layout and losses of a step wait once each, decoding to look whether responses have ended."""

ON_GPU = {"one PPO iteration": 9}
"""Prompts are read as a batch there, at whose mask transformers looks twice; a CPU reads them as one row."""

Waits = dict[str, list[tuple[str, int]]]
"""By what was run, lines and how often they wait."""


def waits_on(device: str, folder: str) -> Waits:
    """Run one of each with a model of a few thousand weights.

    Args:
        device: `cuda` or `cpu`.
        folder: models are written to it.
    """
    settings = Settings(device, True, "bf16-mixed" if device == "cuda" else "32-true", 2, 1, folder)
    write_model(settings.shape(), settings.models(), device)
    waits: Waits = syncs("syncs", settings)["waits"]
    return waits


def above_limits(waits: Waits, device: str = "cpu") -> list[str]:
    """What waits more often than it may, a line for each, with the places.

    Args:
        waits: of `waits_on`.
        device: that they were counted on.
    """
    limits = LIMITS | (ON_GPU if device == "cuda" else {})
    counts = {name: sum(count for _, count in places) for name, places in waits.items()}
    return [
        f"{name} waits {count} times, and may {limits[name]}: {waits[name]}"
        for name, count in counts.items()
        if count > limits[name]
    ]


def main() -> int:
    """Run, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; try the script with --device cpu")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        waits = waits_on(options.device, folder)
    for name, places in waits.items():
        print(f"{name}: {places}")
    print("\n".join(above := above_limits(waits, options.device)))
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
