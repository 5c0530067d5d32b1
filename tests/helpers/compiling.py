"""`torch.compile` without a compiler."""

import logging

import torch
from torch._dynamo.testing import CompileCounter

_compile = torch.compile


def use_backend(monkeypatch, backend):
    """Trace as always, and let this make something of it."""
    torch._dynamo.reset()
    # Else pytest would keep all that the compiler says of its work, which takes longer than the work.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)

    def compiled(function, mode="default", **options):
        return _compile(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compiled)


def count_compiling(monkeypatch):
    """Trace as always, then run as it is instead of as generated code; `frame_count` says how often."""
    counter = CompileCounter()
    use_backend(monkeypatch, counter)
    return counter
