"""Asking a policy for answers: prompts of similar length together, each answer by random numbers of its own row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from rlhf_lightning.chat.messages import exact_text
from rlhf_lightning.evaluation.policy import Answer, Policy
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.evaluation.task import Bench, Progress
from rlhf_lightning.generation.sampling import Sampling


def prompt_pieces(rows: Sequence[TextRow], bench: Bench) -> list[list[int]]:
    """Places of rows that are answered together: `batch_size` prompts of similar length, the longest first.

    Args:
        rows: all of them.
        bench: says how many at once.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(exact_text(rows[i].written.prompt)))
    return [order[start : start + bench.batch_size] for start in range(0, len(order), bench.batch_size)]


def answer(policy: Policy, rows: Sequence[TextRow], sampling: Sampling, bench: Bench, told: Progress) -> list[Answer]:
    """An answer to the prompt of each row, which depends on nothing but that row and the seed.

    Args:
        policy: who answers.
        rows: B of them.
        sampling: how.
        bench: has the seed.
        told: of the share that is done, in rows.
    """
    random = policy.row_generators(bench.seed, [("answer", row.row) for row in rows]) if sampling.temperature else None
    share = len(rows) / sampling.max_new_tokens
    return policy.answer([row.written for row in rows], sampling, random, on_token=lambda token: told(token * share))


def prompt_was_cut(policy: Policy, row: TextRow, one: Answer, sampling: Sampling) -> bool:
    """Whether the prompt was too long to be answered whole.

    Args:
        policy: who answered.
        row: whose prompt it was.
        one: the answer, with what was left of the prompt.
        sampling: how it was drawn.
    """
    if policy.context is None or len(one.prompt_ids) < policy.context - sampling.max_new_tokens:
        return False
    return len(policy.chat.encode_prompt(row.written.prompt, row.written.tools)[1]) > len(one.prompt_ids)


def say_cut(model: str, lines: Sequence[Mapping[str, Any]]) -> None:
    """Say in one line how many prompts lost their beginning.

    Args:
        model: who answered.
        lines: of all rows.
    """
    if cut := sum(line["cut"] for line in lines):
        rank_zero_warn(f"{model}: {cut} of {len(lines)} prompts are longer than it may read and lost their beginning")
