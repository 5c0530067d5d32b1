"""`rlhf score`: what a reward model or function says of the answers in a file.

The signature of `score` is the config; its docstring is the help.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.arguments import Range, check_arguments
from rlhf_lightning.cli.functions import run_function
from rlhf_lightning.cli.generate import write_line, written_to
from rlhf_lightning.data.sources import DataSource, as_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.evaluation.policy import Dtype, find_device
from rlhf_lightning.evaluation.results import finite
from rlhf_lightning.evaluation.rows import Part, TextRow, read_rows

_ROWS_AT_ONCE = 256


def score(
    reward: str,
    file: DataSource | None = None,
    part: Part = "all",
    columns: dict[str, str] | None = None,
    num_samples: int | None = None,
    out: str | None = None,
    dtype: Dtype = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    timeout: float | None = None,
    reward_weights: dict[str, float] | None = None,
) -> None:
    """Score the answers of a file as lines of JSON, and say the mean; of pairs also how many are ordered as their rows.

    Args:
        reward: folder or hub id of a reward model, or the import path of a function, like `my_rewards.politeness`.
        file: rows with prompt and response, chosen and rejected, or a ranking, in any form that the stages read.
        part: which of its rows, split as in training: all, train, validation or test.
        columns: our column names (prompt, response, chosen, rejected and so on) to those of the file.
        num_samples: score only this many rows, drawn at random.
        out: file of the scores, which must not be there yet; without it they go to the terminal.
        dtype: of the weights; auto for bfloat16 on GPUs and float32 elsewhere.
        device: cpu, cuda, cuda:1 and so on; by default the first GPU if there is one.
        trust_remote_code: run Python code that comes with the model.
        timeout: seconds that one call of a function may take; null for no limit.
        reward_weights: what the raw logit of each label of a reward model counts, by its name or number, such as
            `{helpfulness: 0.65, verbosity: -0.4}`; needed where it has several.

    Raises:
        UserError: no such reward or device, or data that cannot be read.
    """
    check_arguments(score, locals(), {"reward_weights": Range()})
    find_device(device)
    if file is None:
        raise UserError("nothing is scored; pass --file")
    source = as_source(file, columns)
    need: Any = "preference" if source.open_parts()["train"].has("preference") else "finetune"
    rows = read_rows(source, need, part=part, num_samples=num_samples)
    with written_to(out) as lines:
        judge = Judge.load(
            reward,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            timeout=timeout,
            weights=reward_weights,
        )
        best, leads = [], []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            for row, scores in _scored(judge, rows[start : start + _ROWS_AT_ONCE]):
                write_line(lines, finite(_line(row, scores)))
                if all(map(math.isfinite, scores)):
                    best.append(scores[0])
                    leads += [scores[0] - max(lower) for lower in [_ranked_lower(row, scores)] if lower]
    print(_said(best, leads, len(rows) - len(best), need == "preference"), file=sys.stderr)


def _ranked_lower(row: TextRow, scores: list[float]) -> list[float]:
    """Scores of the responses that rank below the first."""
    ranks = row.ranks or range(len(scores))
    return [score for score, rank in zip(scores, ranks, strict=True) if rank > ranks[0]]


def _said(best: list[float], leads: list[float], lost: int, has_pairs: bool) -> str:
    """What the scores come to: their mean, and of pairs how many are in order."""
    without = f"{lost} rows have a score that is not finite and count for nothing" if lost else ""
    if not best:
        return without
    said = f"mean score {sum(best) / len(best):.4f} of {len(best)} " + (
        "chosen responses" if has_pairs else "responses"
    )
    if leads:
        said += f"; {sum(lead > 0 for lead in leads) / len(leads):.1%} above all that were ranked lower"
        tied = sum(lead == 0 for lead in leads)
        said += f", {tied} tied" if tied else ""
    return f"{said}; {without}" if without else said


def _scored(judge: Judge, rows: Sequence[TextRow]) -> list[tuple[TextRow, list[float]]]:
    """Rows with the scores of their responses."""
    flat = [(row, response) for row in rows for response in row.said(judge.chat)]
    prompts, numbers = [row.written for row, _ in flat], [row.row for row, _ in flat]
    scores = iter(judge.scores(prompts, [response for _, response in flat], rows=numbers).tolist())
    return [(row, [next(scores) for _ in row.responses]) for row in rows]


def _line(row: TextRow, scores: list[float]) -> dict[str, Any]:
    line: dict[str, Any] = {"row": row.row, "prompt": row.written.prompt}
    if len(scores) == 1:
        line |= {"response": row.responses[0], "score": scores[0]}
    elif len(scores) == 2:
        line |= {"chosen": row.responses[0], "rejected": row.responses[1]}
        line |= {"chosen_score": scores[0], "rejected_score": scores[1]}
    else:
        line |= {"responses": list(row.responses), "scores": scores}
    return line | ({"tools": list(row.written.tools)} if row.written.tools else {})


def main(options: Sequence[str]) -> None:
    """Entry point of `rlhf score`.

    Args:
        options: the words after `score`, recipes resolved.

    Raises:
        UserError: something the user can fix.
    """
    run_function(score, "score", options, "REWARD --file DATA [options]")
