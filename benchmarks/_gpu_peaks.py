"""What a device could do at the most, by its maker's word and by a matrix product and a copy here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from _gpu_settings import Settings, best_seconds
from measuring import machine

PEAKS = {
    "B200": (2250, 8000),
    "H200": (989, 4800),
    "H100 PCIe": (756, 2000),
    "H100": (989, 3350),
    "A100": (312, 2039),
    "L40S": (362, 864),
    "L4": (121, 300),
    "A10": (125, 600),
    "4090": (165, 1008),
    "3090": (71, 936),
}
"""Dense bfloat16 TFLOP/s and GB/s by a part of the device's name, as the makers state them; the first that fits."""


class Peaks(NamedTuple):
    """What shares are of.

    Attributes:
        tflops: TFLOP/s.
        bandwidth: GB/s.
        source: whose word that is.
    """

    tflops: float
    bandwidth: float
    source: str


def look_at_device(settings: Settings) -> dict[str, Any]:
    """Name the machine, and measure a large matrix product (TFLOP/s) and a large copy (GB/s) on its device."""
    size = 512 if settings.tiny else 8192 if settings.device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=settings.device, dtype=settings.product_dtype) for _ in range(2))
    source = torch.randn((2 if settings.tiny else 256) * 2**20, device=settings.device)
    target = torch.empty_like(source)
    return {
        "machine": f"{machine()}, torch {torch.__version__}",
        "name": torch.cuda.get_device_name() if settings.device == "cuda" else "",
        "tflops": 2 * size**3 / best_seconds(lambda: torch.mm(a, b)) / 1e12,
        "bandwidth": 2 * source.numel() * 4 / best_seconds(lambda: target.copy_(source)) / 1e9,
    }


def choose_peaks(device: dict[str, Any], tflops: float | None, bandwidth: float | None) -> Peaks:
    """What shares are of: as given, else as the device's maker states, else as measured.

    Args:
        device: from `look_at_device`.
        tflops: as given; None if nothing is.
        bandwidth: likewise.
    """
    measured = device["tflops"], device["bandwidth"]
    stated = next((peaks for key, peaks in PEAKS.items() if key in device["name"]), None)
    source = "as given" if tflops else "as its maker states" if stated else "as measured here"
    known = stated or measured
    return Peaks(tflops or known[0], bandwidth or known[1], source)
