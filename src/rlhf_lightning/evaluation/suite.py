"""Several tasks on the same rows and models: what `rlhf evaluate` runs.

The signature of `evaluate` is the config; its docstring is the help. A new task is a class of `Task` and a parameter of
`evaluate`, which stands among the tasks there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.arguments import AT_LEAST_1, SHARE_BELOW_1, Range, check_arguments
from rlhf_lightning.data.preparing.filters import Splits
from rlhf_lightning.data.rows import Need
from rlhf_lightning.data.sources import DataSource, source_name
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.best_of_n import BestOfN
from rlhf_lightning.evaluation.kl import KL
from rlhf_lightning.evaluation.perplexity import Perplexity
from rlhf_lightning.evaluation.results import LINES, RESULTS, Evaluation, Lines, key_of_settings
from rlhf_lightning.evaluation.reward import Reward
from rlhf_lightning.evaluation.rouge import Rouge
from rlhf_lightning.evaluation.rows import TextRow, read_rows
from rlhf_lightning.evaluation.task import Bench, Report, Task, name_of, no_report
from rlhf_lightning.evaluation.winrate import WinRate
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.folders import check_model_folder
from rlhf_lightning.runs.lock import locked
from rlhf_lightning.runs.writable import check_file

_RANGES = {
    **dict.fromkeys(("num_samples", "batch_size", "max_tokens"), AT_LEAST_1),
    **dict.fromkeys(("validation_split", "test_split"), SHARE_BELOW_1),
    "reward_weights": Range(),
}


def evaluate(
    data: DataSource,
    models: list[str] | None = None,
    rewards: list[str] | None = None,
    reference: str | None = None,
    tasks: list[str] | None = None,
    out: str | Path = "runs/evaluation",
    part: Literal["all", "train", "validation", "test"] = "validation",
    columns: dict[str, str] | None = None,
    num_samples: int | None = None,
    validation_split: float = 0.1,
    test_split: float = 0.0,
    stage_split: dict[str, float] | None = None,
    split_by: Literal["dialogue", "prompt"] = "dialogue",
    on_bad_row: Literal["auto", "skip", "error"] = "auto",
    perplexity: Perplexity = Perplexity(),  # noqa: B008, frozen
    rouge: Rouge = Rouge(),  # noqa: B008, frozen
    reward: Reward = Reward(),  # noqa: B008, frozen
    kl: KL = KL(),  # noqa: B008, frozen
    winrate: WinRate = WinRate(),  # noqa: B008, frozen
    best_of_n: BestOfN = BestOfN(),  # noqa: B008, frozen
    sampling: Sampling = Sampling(),
    batch_size: int = 32,
    max_tokens: int = 4096,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
    reward_weights: dict[str, dict[str, float]] | None = None,
    seed: int = 42,
    report: Report = no_report,
) -> Evaluation:
    """Measure models on held-out rows, and write `evaluation.json` and `evaluation.jsonl`.

    One that was stopped goes on where it was when it is started again with the same settings.

    Args:
        data: a file (.json, .jsonl, .csv, .tsv, .parquet, also gzipped), a list, folder or glob of such files, a
            `save_to_disk` folder, a hub id `owner/name` or `owner/name:split`, or a source class of YAML, such as
            rlhf_lightning.Blend.
        models: language models to measure, folders or hub ids: exports of any stage, and the pretrained one.
        rewards: reward models, folders or hub ids, or import paths of functions, to measure.
        reference: language model that the KL is taken to.
        tasks: what to measure, by name; by default the perplexity of models, their KL where there is a reference, and
            the accuracy of rewards.
        out: folder to write to.
        part: `validation` and `test` are those splits of the data, or where they bring none the shares held out as in
            training; `train` is the rest; `all` is every row.
        columns: our column names (prompt, response, chosen, rejected, messages and so on) to those of the data.
        num_samples: measure on this many rows, drawn at random, the same each time; by default on all.
        validation_split: share of the prompts that training held out for validation.
        test_split: share of the prompts that training held out for testing.
        stage_split: share of the prompts for each stage, as in training.
        split_by: what stayed on one side of the splits, as in training.
        on_bad_row: stop at the first bad row, skip and count them all, or skip them up to 1% of the rows.
        perplexity: of the best response of each row, given its prompt.
        rouge: of answers, against the best response of each row.
        reward: accuracy and calibration of rewards on pairs, and how much of it is length.
        kl: of each model from the reference.
        winrate: of models over one another, by a judge.
        best_of_n: what the best of n answers is worth, and the other models beside it.
        sampling: how answers are drawn.
        batch_size: prompts answered at once.
        max_tokens: read at once by a model, padding included.
        dtype: of the weights; `auto` for bfloat16 on GPUs and float32 elsewhere.
        trust_remote_code: allow model folders to run Python code of their own.
        reward_weights: what the raw logit of each label counts, by the name of a reward model and those of its labels,
            such as `{HelpSteer2-RM: {helpfulness: 0.65, verbosity: -0.4}}`; needed for models of several labels.
        seed: of all that is drawn; an answer depends on it and its own row only.
        report: from Python, told what is done now and of how many rows; gives what is told of the progress.

    Returns:
        What was found.

    Raises:
        UserError: something the user can fix.
    """
    settings = {name: value for name, value in locals().items() if name != "report"}
    check_arguments(evaluate, settings, _RANGES)
    bench = Bench(
        policies=[*dict.fromkeys(models or [])],
        rewards=[*dict.fromkeys(rewards or [])],
        reference=reference,
        sampling=sampling,
        batch_size=batch_size,
        max_tokens=max_tokens,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        seed=seed,
        report=report,
        reward_weights=reward_weights or {},
    )
    known = {task.name: task for task in (perplexity, rouge, reward, kl, winrate, best_of_n)}
    chosen = choose_tasks(known, tasks, bench)
    splits = Splits(validation_split, test_split, stage_split, split_by)

    def read(need: Need) -> list[TextRow]:
        options: dict[str, Any] = {"part": part, "columns": columns, "num_samples": num_samples}
        return read_rows(data, need, splits=splits, on_bad_row=on_bad_row, **options)

    unused = known.keys() - {task.name for task in chosen}
    said = {name: value for name, value in settings.items() if name not in unused} | {"data": source_name(data)}
    place = Path(out).expanduser()
    for file in (RESULTS, LINES):
        check_file("--out", place / file)
    with locked(place, "--out"):
        return run_tasks(chosen, bench, read, place, said)


def choose_tasks(known: Mapping[str, Task], names: Sequence[str] | None, bench: Bench) -> list[Task]:
    """The tasks that are asked for, checked as far as that takes no weights.

    Args:
        known: by their names.
        names: of those that are asked for; None for those that are measured by default.
        bench: what there is to measure.

    Raises:
        UserError: an unknown task, nothing to measure, a model that is not there, or something else that is missing.
    """
    if names is None:
        names = [name for name, task in known.items() if task.by_default(bench)]
        if not names:
            raise UserError(
                "there is nothing to measure; name language models with --models, reward models with --rewards"
            )
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"tasks: '{name}' is unknown; {hint}there are {', '.join(known)}")
    for model in [*bench.policies, *([bench.reference] if bench.reference else [])]:
        check_model_folder(model)
    for reward in bench.rewards:
        bench.find(reward)
    chosen = [known[name] for name in dict.fromkeys(names)]
    asked = [*bench.rewards, *(value for task in chosen for value in vars(task).values() if isinstance(value, str))]
    for reward in bench.reward_weights:
        if reward not in asked:
            raise UserError(f"reward_weights names '{reward}', which is none of the rewards; name it as they do")
    for task in chosen:
        task.check(bench)
    return chosen


def run_tasks(
    tasks: Sequence[Task],
    bench: Bench,
    read: Callable[[Need], list[TextRow]],
    out: str | Path,
    settings: Mapping[str, Any],
) -> Evaluation:
    """Run tasks one after the other; after each, what is known so far is written.

    Args:
        tasks: in order.
        bench: models, and how they are asked.
        read: gives the rows that hold what a task needs.
        out: folder to write to.
        settings: as `evaluation.json` says them.
    """
    out = Path(out).expanduser()
    lines, evaluation = Lines(out), Evaluation(plain(settings))
    rows: dict[Need, list[TextRow]] = {}
    for task in tasks:
        if task.need not in rows:
            bench.report(f"reading rows for {task.name}", 0)
            rows[task.need] = read(task.need)
        lines.contents = {row.row: key_of_settings(row) for row in rows[task.need]}
        results, curves = task.run(rows[task.need], bench, lines)
        evaluation.results += results
        evaluation.curves += curves
        evaluation.save(out)
    lines.finish()
    return evaluation


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else name_of(value)
