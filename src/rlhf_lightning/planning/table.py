"""A plan for people, and for machines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_lightning.planning.advice import Change
from rlhf_lightning.planning.plan import FITS_BELOW, GIB, Part, Plan, Role

_ROLES = ("parameters", "trained", "weights", "gradients", "optimizer", "copies")
_PARTS = ("gradients", "activations", "logits", "cache", "buffers")


def print_plan(plan: Plan, changes: Iterable[Change], console: Console) -> None:
    """Show a plan.

    Args:
        plan: the plan.
        changes: what would make it fit.
        console: where.
    """
    _say(console, title(plan))
    _say(console, _per_process(plan))
    console.print(_role_table(plan))
    _say(console, "")
    console.print(_part_table(plan))
    _say(console, "")
    for line in (*_verdict(plan), *_sent(plan), *plan.assumed):
        _say(console, line)
    if listed := [*changes]:
        _say(console, "\nWhat to change, the cheapest first, each added to those before it:")
        console.print(_change_table(listed, plan))


def title(plan: Plan) -> str:
    """Which run it is."""
    request = plan.request
    device = "GPU" if request.on_gpu else "process"
    many = f"{request.gpus} {device}{'s' if request.gpus > 1 and request.on_gpu else 'es' if request.gpus > 1 else ''}"
    where = f" on {request.nodes} machines" if request.nodes > 1 else ""
    memory = "" if request.gpu_memory is None else f" of {request.gpu_memory:g} GiB"
    precision = request.trainer.get("precision") or "32-true"
    return f"{request.stage.__name__}, {many}{memory}{where}, {request.sheet.name}, {precision}; GiB on each {device}"


def _per_process(plan: Plan) -> str:
    sizes, request = plan.sizes, plan.request
    kind = "pairs" if request.has_pairs else "responses" if request.answers else "rows"
    pieces = sizes["micro_batches"]
    many = "1 micro-batch" if pieces == 1 else f"{pieces} micro-batches of {sizes['micro_batch']}"
    said = f"a step: {sizes['step']} {kind} on each, in {many}"
    if request.answers:
        limits = f"{request.prompt_length} + {request.response_length} tokens"
        return f"{said}; a rollout: {sizes['responses']}, {sizes['answered']} answered at once, of {limits}\n"
    return f"{said}, of {'2 x ' if request.has_pairs else ''}{request.length} tokens\n"


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _table(first: str, others: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def gib(size: float) -> str:
    """Bytes in GiB; empty for none.

    Example:
        >>> gib(3 * 2**30), gib(0), gib(1)
        ('3.00', '', '0.00')
    """
    return f"{size / GIB:.2f}" if size else ""


def count(number: int) -> str:
    """A number of parameters.

    Example:
        >>> count(8_030_261_248), count(41_943_040), count(4096), count(0)
        ('8.03 B', '41.9 M', '4.1 k', '')
    """
    for size, unit, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if number >= size:
            return f"{number / size:.{digits}f} {unit}"
    return str(number or "")


def _role_table(plan: Plan) -> Table:
    table = _table("role", ("parameters", "trained", "shared", "weights", "gradients", "optimizer", "float32 copies"))
    for role in plan.roles:
        table.add_row(role.name, *_cells(role))
    if len(plan.roles) > 1:
        table.add_row("together", *_cells(_sum(plan.roles)), style="bold")
    return table


def _cells(role: Role) -> Iterator[str]:
    yield from (count(number) for number in (role.parameters, role.trained, role.shared))
    yield from (gib(size) for size in (role.weights, role.gradients, role.optimizer, role.copies))


def _sum(roles: list[Role]) -> Role:
    names = ("parameters", "trained", "shared", "weights", "gradients", "optimizer", "copies")
    totals: Any = {name: sum(getattr(role, name) for role in roles) for name in names}
    return Role("together", **totals)


def _part_table(plan: Plan) -> Table:
    table = _table("while it", ("held", *_PARTS, "together"))
    for part in plan.parts:
        total = plan.held + part.together + plan.outside
        cells = [gib(getattr(part, name)) for name in _PARTS]
        table.add_row(part.name, gib(plan.held), *cells, gib(total), style="bold" if part is plan.worst else "")
    return table


def _verdict(plan: Plan) -> Iterator[str]:
    request = plan.request
    beside = f", {gib(plan.outside)} of it outside of PyTorch" if plan.outside else ""
    said = f"peak: {gib(plan.peak)} GiB while it {plan.worst.name}{beside}"
    if plan.share is not None:
        verdict = "fits" if plan.fits else f"does not fit: {FITS_BELOW:.0%} may be used"
        said += f"; {plan.share:.0%} of {request.gpu_memory:g} GiB: {verdict}"
    yield said
    if plan.on_cpu:
        yield f"in CPU memory of each machine: {gib(plan.on_cpu)} GiB"


def _sent(plan: Plan) -> Iterator[str]:
    for when, sent in (("optimizer step", plan.sent), ("rollout", plan.sent_by_rollout)):
        if sent:
            parts = " + ".join(f"{gib(size) or '0'} ({name})" for name, size in sent.items())
            yield f"sent by each GPU per {when}: {parts} GiB"


def _change_table(changes: list[Change], plan: Plan) -> Table:
    table = _table("option", ("peak", "of memory"))
    table.add_column("cost")
    for change in changes:
        share = "" if plan.request.gpu_memory is None else f"{change.peak / (plan.request.gpu_memory * GIB):.0%}"
        table.add_row(Text(change.options), gib(change.peak), share, Text(change.cost))
    return table


def as_json(plan: Plan, changes: Iterable[Change]) -> dict[str, Any]:
    """A plan as plain values; sizes are bytes on one GPU.

    Args:
        plan: the plan.
        changes: what would make it fit.
    """
    request = plan.request
    return {
        "stage": request.stage.__name__,
        "strategy": request.sheet.name,
        "precision": request.trainer.get("precision") or "32-true",
        "gpus": request.gpus,
        "nodes": request.nodes,
        "gpu_memory": None if request.gpu_memory is None else int(request.gpu_memory * GIB),
        "sizes": plan.sizes,
        "roles": [_whole(vars(role)) for role in plan.roles],
        "held": int(plan.held),
        "outside": int(plan.outside),
        "parts": [_part_values(part) for part in plan.parts],
        "peak": int(plan.peak),
        "share": plan.share,
        "fits": plan.fits,
        "on_cpu_per_node": int(plan.on_cpu),
        "sent_per_step": plan.sent,
        "sent_per_rollout": plan.sent_by_rollout,
        "assumed": plan.assumed,
        "changes": [_whole(vars(change)) for change in changes],
    }


def _part_values(part: Part) -> dict[str, Any]:
    return {**_whole(vars(part)), "together": int(part.together)}


def _whole(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: int(value) if isinstance(value, float) else value for name, value in values.items()}
