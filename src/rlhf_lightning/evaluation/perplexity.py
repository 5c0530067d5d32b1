"""How well language models predict responses: of several beside one another, the pretrained one too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.arguments import AT_LEAST_1, check_arguments
from rlhf_lightning.batches import length_sorted_pieces
from rlhf_lightning.data.encode import EncodedRow, encode_rows
from rlhf_lightning.data.limits import TokenLimits
from rlhf_lightning.data.rows import Need
from rlhf_lightning.evaluation.policy import Policy
from rlhf_lightning.evaluation.results import Curve, Lines, Result
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.evaluation.statistics import results_by_group, sources
from rlhf_lightning.evaluation.task import Bench, Progress, Task
from rlhf_lightning.functional.intervals import Array

_ENDLESS = 1 << 30


@dataclass(frozen=True)
class Perplexity(Task):
    """Perplexity of each row's response, its best one, given its prompt; the tokens of the prompt do not count.

    Args:
        max_length: most tokens of prompt and response, cut as in training; None for what the model can read.
    """

    name: ClassVar[str] = "perplexity"
    need: ClassVar[Need] = "finetune"
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_arguments(Perplexity, vars(self), {"max_length": AT_LEAST_1}, "perplexity.")

    def by_default(self, bench: Bench) -> bool:
        """Wherever there are models."""
        return bool(bench.policies)

    def check(self, bench: Bench) -> None:
        """Refuse to begin without any."""
        bench.check_policies(self.name)

    def run(self, rows: list[TextRow], bench: Bench, lines: Lines) -> tuple[list[Result], list[Curve]]:
        """Measure each model, see `Task`."""
        results: list[Result] = []
        for model in bench.policies:
            found = self._lines(model, rows, bench, lines)
            results += _results(model, rows, found, bench.seed)
        return results, []

    def _lines(self, model: str, rows: list[TextRow], bench: Bench, lines: Lines) -> list[dict[str, Any]]:
        policy = bench.policy(model)
        encoded = self._encode(policy, rows)
        sound = [place for place, ids in enumerate(encoded) if isinstance(ids, EncodedRow)]
        lengths = torch.tensor([[len(encoded[i].prompt), len(encoded[i].responses[0])] for i in sound])  # type: ignore[union-attr]
        pieces = [[sound[i] for i in piece] for piece in length_sorted_pieces(lengths, None, bench.max_tokens)]
        if refused := sorted({*range(len(rows))} - {*sound}):
            reason = encoded[refused[0]]
            rank_zero_warn(f"{model}: {len(refused)} of {len(rows)} rows have no perplexity, the first since {reason}")
            pieces.append(refused)

        def ask(places: list[int], told: Progress) -> list[dict[str, Any]]:
            ids = [encoded[place] for place in places]
            if not isinstance(ids[0], EncodedRow):
                return [{"prompt": rows[i].written.text, "reason": why} for i, why in zip(places, ids, strict=True)]
            prompts = [torch.from_numpy(each.prompt).long() for each in ids]  # type: ignore[union-attr]
            responses = [torch.from_numpy(each.responses[0]).long() for each in ids]  # type: ignore[union-attr]
            logprobs = policy.logprobs(prompts, responses, max_tokens=bench.max_tokens)
            return [
                {
                    "prompt": rows[i].written.text,
                    "response": rows[i].responses[0],
                    "nll": -float(values.double().sum()),
                    "tokens": len(values),
                    "bytes": _bytes_read(policy, rows[i], each),  # type: ignore[arg-type]
                    "cut": bool(each.cut),  # type: ignore[union-attr]
                }
                for i, values, each in zip(places, logprobs, ids, strict=True)
            ]

        key = self.key(model, bench.dtype)
        found = self.each_row(model, key, rows, pieces, ask, bench, lines)
        if cut := sum(bool(line.get("cut")) for line in found):
            rank_zero_warn(f"{model}: {cut} of {len(rows)} rows are longer than it may read, and were cut")
        return found

    def _encode(self, policy: Policy, rows: list[TextRow]) -> list[EncodedRow | str]:
        """Ids of each row's prompt and best response, or why there are none."""
        limits = [limit for limit in (policy.context, self.max_length) if limit is not None]
        limit = TokenLimits(max_length=min(limits, default=_ENDLESS))
        return encode_rows([row.as_row(1) for row in rows], policy.chat, limit)


def _bytes_read(policy: Policy, row: TextRow, ids: EncodedRow) -> int:
    """Bytes of the response, or of what is left of it where it was cut."""
    cut = "response" in ids.cut
    return len((policy.chat.decode(ids.responses)[0] if cut else row.responses[0]).encode())


def _results(model: str, rows: list[TextRow], lines: list[dict[str, Any]], seed: int) -> list[Result]:
    measured = [(row, line) for row, line in zip(rows, lines, strict=True) if "nll" in line]
    groups = sources([row for row, _ in measured])
    per_token = [(line["nll"], line["tokens"]) for _, line in measured]
    per_byte = [(line["nll"] / math.log(2), line["bytes"]) for _, line in measured]
    return [
        *results_by_group("perplexity", model, per_token, groups, seed, _exp_ratio),
        *results_by_group("nll_per_token", model, per_token, groups, seed),
        *results_by_group("bits_per_byte", model, per_byte, groups, seed),
    ]


def _exp_ratio(totals: Array) -> Array:
    perplexities: Array = np.exp(totals[..., 0] / totals[..., 1])
    return perplexities
