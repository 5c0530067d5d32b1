"""`rlhf generate`: what a model answers to one prompt, or to every prompt of a file.

The signature of `generate` is the config; its docstring is the help.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from rlhf_lightning.arguments import AT_LEAST_1, check_arguments
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.cli.functions import run_function
from rlhf_lightning.data.sources import DataSource
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Answer, Dtype, Policy, find_device
from rlhf_lightning.evaluation.rows import Part, TextRow, read_rows
from rlhf_lightning.generation.sampling import Sampling

_BATCHES_AT_ONCE = 8
"""Batches whose prompts are sorted by length together, and are written when all are answered."""


def generate(
    model: str,
    prompt: str | None = None,
    file: DataSource | None = None,
    part: Part = "all",
    columns: dict[str, str] | None = None,
    num_samples: int | None = None,
    out: str | None = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int | None = None,
    seed: int = 1,
    batch_size: int = 32,
    dtype: Dtype = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Answer one prompt on the terminal, as the words come, or every prompt of a file as lines of JSON.

    Args:
        model: a Hugging Face folder, a PEFT adapter folder, or a hub id.
        prompt: what is asked. A model that does not say how its dialogues were written is given it as one turn of the
            user if it has a chat template; any other as its training wrote a prompt of this text.
        file: prompts in any form that the stages read; answers in it are left out.
        part: which of its rows, split as in training: all, train, validation or test.
        columns: our column names (prompt, messages and so on) to those of the file.
        num_samples: answer only this many rows, drawn at random.
        out: file of the answers, which must not be there yet; without it they go to the terminal.
        temperature: the logits are divided by it; 0 takes the most likely token.
        top_p: sample among the most likely tokens that together have this probability; 1 for all.
        top_k: sample among the k most likely tokens only; 0 for all.
        max_new_tokens: an answer is cut here if it has not ended; by default at 256, or at half of a shorter context.
        seed: a row gets the same answer for the same seed, whatever the other rows.
        batch_size: prompts answered at once.
        dtype: of the weights; auto for bfloat16 on GPUs and float32 elsewhere.
        device: cpu, cuda, cuda:1 and so on; by default the first GPU if there is one.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: no such model or device, an empty prompt, or data that cannot be read.
    """
    check_arguments(generate, locals(), {"batch_size": AT_LEAST_1})
    find_device(device)
    sampling = Sampling(temperature, top_k, top_p, 1 if max_new_tokens is None else max_new_tokens)
    if (prompt is None) == (file is None):
        raise UserError("nothing is asked, or two things; pass either --prompt or --file")
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt is empty; write what is asked")
    rows = None if file is None else read_rows(file, "prompts", part=part, columns=columns, num_samples=num_samples)
    with written_to(out) as lines:
        policy = Policy.load(
            model, dtype=dtype, device=device, batch_size=batch_size, trust_remote_code=trust_remote_code
        )
        if max_new_tokens is None:
            sampling = replace(sampling, max_new_tokens=policy.ample_response)
        if rows is None:
            assert prompt is not None
            _answer_one(policy, policy.asked(prompt), sampling, seed, lines if out else None)
        else:
            _answer_rows(policy, rows, sampling, seed, batch_size * _BATCHES_AT_ONCE, lines)


def _answer_one(policy: Policy, written: WrittenPrompt, sampling: Sampling, seed: int, lines: TextIO | None) -> None:
    answer = None
    shown = ""
    for (answer,) in policy.stream([written], sampling, policy.row_generators(seed, [(0,)])):
        if lines is None:
            print(answer.text.removeprefix(shown), end="", flush=True)
            shown = answer.text
    assert answer is not None
    if lines is None:
        print()
    else:
        write_line(lines, answer_line(0, written, answer))


def _answer_rows(
    policy: Policy, rows: Sequence[TextRow], sampling: Sampling, seed: int, size: int, lines: TextIO
) -> None:
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        random = policy.row_generators(seed, [(row.row,) for row in some])
        for row, answer in zip(some, policy.answer([row.written for row in some], sampling, random), strict=True):
            write_line(lines, answer_line(row.row, row.written, answer))


def answer_line(row: int, written: WrittenPrompt, answer: Answer) -> dict[str, Any]:
    """An answer as a line of JSON that the stages and `rlhf score` read again.

    Args:
        row: number of the prompt.
        written: the prompt.
        answer: to it.
    """
    line: dict[str, Any] = {"row": row, "prompt": written.prompt, "response": answer.text}
    if written.tools:
        line["tools"] = list(written.tools)
    return line | {"ended": answer.ended, "tokens": len(answer.ids)}


@contextmanager
def written_to(out: str | None) -> Iterator[TextIO]:
    """A new file for lines of JSON, or the terminal.

    Args:
        out: path of the file; None for the terminal.

    Raises:
        UserError: a file that is there already, or cannot be made.
    """
    if out is None:
        yield sys.stdout
        return
    path = Path(out).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"--out {out}: the file is there already; name another, or remove it") from error
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a file that can be written") from error
    try:
        with stream:
            yield stream
    finally:
        if path.is_file() and not path.stat().st_size:
            path.unlink()


def write_line(lines: TextIO, line: Mapping[str, Any]) -> None:
    """Write one line of JSON.

    Args:
        lines: the file.
        line: what stands in it.
    """
    print(json.dumps(line, ensure_ascii=False), file=lines, flush=True)


def main(options: Sequence[str]) -> None:
    """Entry point of `rlhf generate`.

    Args:
        options: the words after `generate`, recipes resolved.

    Raises:
        UserError: something the user can fix.
    """
    run_function(generate, "generate", options, "MODEL (--prompt TEXT | --file DATA) [options]")
