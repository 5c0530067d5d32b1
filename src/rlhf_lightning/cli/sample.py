"""`rlhf sample`: of several answers to each prompt of a file the best by a reward, as rows to train on.

The signature of `sample` is the config; its docstring is the help.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from rlhf_lightning.arguments import AT_LEAST_1, Range, check_arguments
from rlhf_lightning.cli.evaluate import reporting
from rlhf_lightning.cli.functions import run_function
from rlhf_lightning.data.sources import DataSource
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Dtype, find_device
from rlhf_lightning.evaluation.rejection import Keep, Rejection, Sampled, SystemKept, check_settings, sample_rows
from rlhf_lightning.evaluation.rejection import settings_of as settings_of_rows
from rlhf_lightning.evaluation.results import Lines
from rlhf_lightning.evaluation.rows import Part, read_rows
from rlhf_lightning.evaluation.task import Bench
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.folders import check_model_folder
from rlhf_lightning.models.rewarding import find_reward
from rlhf_lightning.runs.lock import locked
from rlhf_lightning.runs.whole_files import write_whole
from rlhf_lightning.runs.writable import check_file

_OURS = {"row", "prompt", "k", "policy", "reward"}
"""What each row of ours holds."""


def sample(
    policy: str,
    reward: str,
    data: DataSource,
    out: str,
    k: int = 16,
    keep: Keep = "best",
    unfinished: Literal["drop", "keep"] = "drop",
    label: str | None = None,
    system: str | None = None,
    system_kept: SystemKept = "none",
    part: Part = "all",
    columns: dict[str, str] | None = None,
    num_samples: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int | None = None,
    seed: int = 1,
    batch_size: int = 32,
    dtype: Dtype = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    timeout: float | None = None,
    reward_weights: dict[str, float] | None = None,
    overwrite: bool = False,
) -> None:
    """Draw k answers to each prompt, and write the best by a reward as lines of JSON that the stages read.

    Args:
        policy: who answers: a Hugging Face folder, a PEFT adapter folder, or a hub id.
        reward: folder or hub id of a reward model, or the import path of a function, like `my_rewards.politeness`.
        data: prompts in any form that the stages read; answers in it are left out.
        out: file of the rows. Until all are made they stand in OUT.partial, from which the same command goes on.
        k: answers to each prompt.
        keep: best for prompt and response; all for a ranking of the answers by score; pair for the best, chosen, over
            the worst, rejected.
        unfinished: answers that did not end within max_new_tokens are dropped, as training would teach them as
            complete; keep lets them take part.
        label: written into each row as `iteration`, so that rows of several iterations can be told apart.
        system: an instruction that the answers are drawn with, as a system turn.
        system_kept: what the rows keep of it: none, for context distillation; first, its system turn only, though it
            stood before every turn of the user (Ghost Attention); all, wherever it stood.
        part: which of the rows, split as in training: all, train, validation or test.
        columns: our column names (prompt, messages and so on) to those of the data.
        num_samples: answer only this many rows, drawn at random.
        temperature: the logits are divided by it; Llama 2 was best at 1.2 to 1.3 for 10 to 100 answers.
        top_p: sample among the most likely tokens that together have this probability; 1 for all.
        top_k: sample among the k most likely tokens only; 0 for all.
        max_new_tokens: an answer is cut here if it has not ended; by default at 256, or at half of a shorter context.
        seed: an answer depends on it, its row and its number among the k, whatever the batch size.
        batch_size: answers written at once.
        dtype: of the weights; auto for bfloat16 on GPUs and float32 elsewhere.
        device: cpu, cuda, cuda:1 and so on; by default the first GPU if there is one.
        trust_remote_code: run Python code that comes with the models.
        timeout: seconds that one call of a reward function may take; null for no limit.
        reward_weights: what the raw logit of each label of a reward model counts, by its name or number.
        overwrite: replace OUT, and begin anew where OUT.partial was begun with other settings.

    Raises:
        UserError: something the user can fix.
    """
    check_arguments(sample, locals(), {"batch_size": AT_LEAST_1, "reward_weights": Range()})
    find_device(device)
    rejection = Rejection(k, keep, unfinished, label, system, system_kept)
    sampling = Sampling(temperature, top_k, top_p, 1 if max_new_tokens is None else max_new_tokens)
    if temperature == 0 and k > 1:
        raise UserError(f"temperature 0 draws the same answer {k} times; set it above 0, or k to 1")
    _places(out, overwrite)  # before the models are looked at
    check_model_folder(policy)
    find_reward(reward, timeout, reward_weights)
    place = Path(out).expanduser()
    with locked(place.parent, "--out", place.name):
        target, partial = _places(out, overwrite)
        rows = read_rows(data, "prompts", part=part, columns=columns, num_samples=num_samples)
        bench = Bench(
            [policy],
            [reward],
            sampling=sampling,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            timeout=timeout,
            seed=seed,
            reward_weights={} if reward_weights is None else {reward: reward_weights},
        )
        drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
        settings = json.loads(json.dumps(settings_of_rows(rejection, bench, rows, **drawn)))
        lines = _begun(partial, settings, overwrite)
        with reporting(Console(stderr=True)) as bench.report:
            if max_new_tokens is None:
                bench.sampling = Sampling(temperature, top_k, top_p, bench.policy(policy).ample_response)
            try:
                found = sample_rows(rows, rejection, bench, lines, settings)
            except KeyboardInterrupt:
                if partial.is_file():
                    print(f"what is made stands in '{partial}'; the same command goes on from there", file=sys.stderr)
                raise
        _finish(found, target, partial, len(rows))


def _places(out: str, overwrite: bool) -> tuple[Path, Path]:
    """The file, and the one in which its rows stand until all are made."""
    target = Path(out).expanduser()
    partial = target.with_name(f"{target.name}.partial")
    check_file("--out", target)
    if partial.is_dir():
        raise UserError(f"--out {out}: there is a folder '{partial}', where its rows are to stand; name another file")
    if target.exists() and not _is_ours(target):
        raise UserError(
            f"--out {out}: the file is there already, and not what `rlhf sample` writes; name another, or move it away"
        )
    if target.exists() and not (partial.exists() or overwrite):  # with both it was being replaced
        raise UserError(f"--out {out}: the file is there already; name another, or pass --overwrite true")
    return target, partial


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    try:
        said = json.loads(first)
    except ValueError:
        return not first
    return isinstance(said, dict) and said.keys() >= _OURS


def _begun(partial: Path, settings: dict[str, Any], overwrite: bool) -> Lines:
    """The lines that were made before with these settings, and place for more."""
    lines = Lines(partial.parent, partial.name, "rlhf sample")
    try:
        check_settings(lines, settings)
    except UserError:
        if not overwrite:
            raise
        partial.unlink()
        lines = Lines(partial.parent, partial.name, "rlhf sample")
    return lines


def _finish(found: Sampled, target: Path, partial: Path, prompts: int) -> None:
    """Write all rows at once, and say what came of the prompts."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in found.dropped.most_common())
    lost = ", ".join(f"{count} {reason}" for reason, count in found.answers.most_common())
    if not found.rows:
        partial.unlink()
        hint = "; raise --max_new_tokens, or pass --unfinished keep" if "response did not end" in lost else ""
        raise UserError(
            f"none of {prompts} prompts leaves a row ({dropped}{'; answers: ' if lost else ''}{lost}){hint}"
        )
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in found.rows)
    try:
        write_whole(target, text)
    except OSError as error:
        raise UserError(f"--out {target}: {error.strerror}; name a file that can be written") from error
    partial.unlink()
    print(
        f"{prompts} prompts: {len(found.rows)} rows in '{target}', dropped {found.dropped.total()}"
        f"{f' ({dropped})' if dropped else ''}; mean score {found.best:.4f} of the best answers, {found.mean:.4f} of "
        f"all{f'; answers that do not count: {lost}' if lost else ''}",
        file=sys.stderr,
    )


def main(options: Sequence[str]) -> None:
    """Entry point of `rlhf sample`.

    Args:
        options: the words after `sample`, recipes resolved.

    Raises:
        UserError: something the user can fix.
    """
    usage = "--policy MODEL --reward REWARD --data PROMPTS --out FILE [options]"
    run_function(sample, "sample", options, usage, positional=False)
