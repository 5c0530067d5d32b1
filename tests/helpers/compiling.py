"""`torch.compile` without a compiler."""

import logging

import torch
from torch._dynamo.testing import CompileCounter

from rlhf_lightning.generation.picking import CompiledPick

_compile = torch.compile


def use_backend(monkeypatch, backend, picking="eager"):
    """Trace as always, and let this make something of the model's step, and `picking` of what draws its tokens."""
    torch._dynamo.reset()
    # Else pytest would keep all that the compiler says of its work, which takes longer than the work.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)

    def compiled(function, mode="default", **options):
        draws = isinstance(getattr(function, "__self__", None), CompiledPick)
        return _compile(function, backend=picking if draws else backend, **options)

    monkeypatch.setattr(torch, "compile", compiled)


def count_compiling(monkeypatch):
    """Trace as always, then run as it is instead of as generated code; `frame_count` says how often."""
    counter = CompileCounter()
    use_backend(monkeypatch, counter)
    return counter
