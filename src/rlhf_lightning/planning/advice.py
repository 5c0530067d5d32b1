"""What to change in a run that does not fit, the cheapest first, each added to those before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlhf_lightning.errors import UserError
from rlhf_lightning.planning.plan import Plan, plan
from rlhf_lightning.planning.request import Request
from rlhf_lightning.training.sheets import SHARDED, SHARDED_ON_CPU

_WORTH = 0.99
"""Of the peak, that a change must come below to be named."""
_MOST_GPUS = 1024


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        options: what to add to the command line.
        cost: what it costs.
        peak: bytes of a GPU, with all changes before it.
        fits: whether that is little enough.
    """

    options: str
    cost: str
    peak: float
    fits: bool


@dataclass(frozen=True)
class _Try:
    options: str
    cost: str
    request: Request


def advise(planned: Plan) -> list[Change]:
    """What to change, in this order, until the run fits; nothing if it does.

    Args:
        planned: the run as it is.
    """
    changes: list[Change] = []
    now, tried = planned, set[str]()
    while not now.fits:
        found = next((each for each in _tries(now) if each.options not in tried), None)
        if found is None:
            return changes
        tried.add(found.options)
        try:
            after = plan(found.request)
        except UserError:  # this stage cannot
            continue
        if after.peak < _WORTH * now.peak:
            changes.append(Change(found.options, found.cost, after.peak, after.fits))
            now = after
    return changes


def _tries(now: Plan) -> Iterator[_Try]:
    request, model, sheet = now.request, now.request.model, now.request.sheet
    if request.answers and model.get("frozen_dtype") == "auto" and sheet.loaded.itemsize > 2 and not sheet.converts:
        yield _Try(
            "--model.frozen_dtype bfloat16",
            "reference and reward are rounded",
            request.changed("model", frozen_dtype="bfloat16"),
        )
    if now.worst.cache and model.get("rollout_weights") == "gathered":
        layered = request.changed("model", rollout_weights="layered")
        yield _Try("--model.rollout_weights layered", "weights are sent for every token", layered)
    if now.worst.cache and now.sizes["answered"] > 1:
        fewer = max(1, now.sizes["answered"] // 4)
        yield _Try(
            f"--model.generation_batch_size {fewer}",
            "slower rollouts",
            request.changed("model", generation_batch_size=fewer),
        )
    if now.sizes["micro_batch"] > 1:
        one = request.changed("model", micro_batch_size=1, max_tokens_per_batch=None)
        yield _Try("--model.micro_batch_size 1", "smaller products, the same gradient", one)
    if not model.get("gradient_checkpointing"):
        again = request.changed("model", gradient_checkpointing=True)
        yield _Try("--model.gradient_checkpointing true", "a third more time", again)
    if not sheet.shards_weights and request.gpus > 1:
        yield _Try(
            "--config trainer/fsdp2.yaml",
            "weights are sent for every pass",
            request.changed("trainer", strategy=SHARDED),
        )
    if model.get("value_trunk") == "own":
        trunk = request.changed("model", value_trunk="policy", value_name_or_path=None)
        yield _Try("--model.value_trunk policy", "policy and values share hidden states", trunk)
    if sheet.shards_weights and not sheet.offloads_weights and request.gpus > 1:
        yield _Try(
            "--config trainer/fsdp2_offload.yaml",
            "weights pass from CPU memory to the GPU; several times slower",
            request.changed("trainer", strategy=SHARDED_ON_CPU),
        )
    if (model.get("finetune") or {}).get("mode", "all") == "all":
        lora = request.changed("model", finetune={"mode": "lora"}).changed("trainer", precision="bf16-true")
        yield _Try(
            "--model.finetune.mode lora --trainer.precision bf16-true",
            "adapters are trained, at ten times the learning rate",
            lora,
        )
    more = request.gpus * 2
    if more <= _MOST_GPUS:
        nodes = max(request.nodes, -(-more // 8))
        sharded = replace(request, gpus=more, nodes=nodes)
        if not sheet.shards_weights:
            sharded = sharded.changed("trainer", strategy=SHARDED)
        with_it = "" if sheet.shards_weights else " --config trainer/fsdp2.yaml"
        yield _Try(f"--gpus {more}{with_it}", "more GPUs", sharded)
