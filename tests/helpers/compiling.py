"""`torch.compile` without a compiler."""

import torch
from torch._dynamo.testing import CompileCounter

_compile = torch.compile


def use_backend(monkeypatch, backend):
    """Trace as always, and let this make something of it."""
    torch._dynamo.reset()

    def compiled(function, mode, **options):
        return _compile(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compiled)


def count_compiling(monkeypatch):
    """Trace as always, then run as it is instead of as generated code; `frame_count` says how often."""
    counter = CompileCounter()
    use_backend(monkeypatch, counter)
    return counter
