"""Norms of gradients and clipping to them, also where processes hold parts of each gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_


def gradient_norm(parameters: Iterable[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm of the gradients of parameters, a scalar, float32 at least; 0 where none has a gradient.

    Where processes hold parts of them, it is the norm of all parts, and all must call it.

    Args:
        parameters: with their gradients.
        device: of the result.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=device)
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in parts]
    norm = torch.linalg.vector_norm(torch.stack(norms)).to(device)  # parts may lie in CPU memory
    meshes = {g.device_mesh for g in gradients if isinstance(g, DTensor)}
    for mesh in meshes:
        squares = norm.square()
        torch.distributed.all_reduce(squares, group=mesh.get_group())
        norm = squares.sqrt()
    return norm


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], clip: float, norm: Tensor) -> None:
    """Scale gradients down to a norm.

    Args:
        parameters: with their gradients; those without any are passed over.
        clip: the largest norm.
        norm: the norm of all their gradients together.
    """
    parts = [p for p in parameters if isinstance(p.grad, DTensor)]
    if not parts:
        clip_grads_with_norm_(parameters, clip, norm)
        return
    factor = (clip / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for p in parts:
        part = p.grad.to_local()  # type: ignore[union-attr]
        part.mul_(factor.to(part.device))
