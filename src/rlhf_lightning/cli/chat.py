"""`rlhf chat`: talk to models on a page in the browser or in the terminal, and collect preferences."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from rlhf_lightning.app.judgements import Judgements
from rlhf_lightning.app.models import Models
from rlhf_lightning.app.terminal import TerminalChat
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.cli.stages import OneLineParser
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Dtype, find_device
from rlhf_lightning.evaluation.rows import read_rows
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.warning_filters import filter_warnings

PASSWORD = "RLHF_CHAT_PASSWORD"
"""Environment variable of the password: what stands on a command line, others on the machine may read."""


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="rlhf chat",
        description="Talk to models, compare two, and say which answers are better, on a page in the browser.",
        usage="rlhf chat MODEL [MODEL ...] [options]",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder, hub id, or a run: its export and those of its checkpoints")
    add("--reward", help="folder of a reward model, or import path of a function, that scores the answers")
    add("--reward_weights", type=dict[str, float], help="what each label of the reward model counts, such as {good: 1}")
    add("--terminal", action="store_true", help="talk in the terminal, without a page")
    add("--temperature", type=float, default=0.7, help="the logits are divided by it; 0 takes the most likely token")
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of this probability; 1 for all")
    add("--top_k", type=int, default=0, help="sample among the k most likely tokens; 0 for all")
    add("--max_new_tokens", type=int, help="an answer is cut here; by default at 256, or at half of a shorter context")
    add("--seed", type=int, default=1, help="of the answers, and of the sides of pairs that are judged")
    add("--judgements", default="runs/judgements.sqlite", help="file in which judgements are kept")
    add("--prompts", help="prompts to be judged, in any form that the stages read; without them annotators write some")
    add("--examples", help="prepared folder whose example prompt begins a conversation")
    add("--host", default="127.0.0.1", help="address that the page is served at; others need --user and --password")
    add("--port", type=int, default=7860, help="likewise")
    add("--user", help="who may see the page")
    add("--password", help=f"of the user; or set {PASSWORD}, which no list of processes shows")
    add(
        "--dtype",
        choices=[*get_args(Dtype)],
        default="auto",
        help="of the weights; auto: bfloat16, on CPUs for answers",
    )
    add("--device", help="cpu, cuda, cuda:1 and so on; by default the first GPU if there is one")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the models")
    return parser


def main(options: Sequence[str]) -> None:
    """Entry point of `rlhf chat`.

    Args:
        options: the words after `chat`.

    Raises:
        UserError: something the user can fix.
    """
    filter_warnings()
    given = _parser().parse_args(list(options))
    find_device(given.device)
    sampling = Sampling(
        given.temperature, given.top_k, given.top_p, 1 if given.max_new_tokens is None else given.max_new_tokens
    )
    password = given.password or os.environ.get(PASSWORD) if given.user else given.password
    if not given.terminal:
        if importlib.util.find_spec("gradio") is None:
            raise UserError("the page needs gradio: pip install rlhf-lightning[app], or pass --terminal")
        from rlhf_lightning.app.page import check_access, check_port

        check_access(given.host, given.user, password)
        check_port(given.host, given.port)
    models = Models(
        given.models,
        given.reward,
        dtype=given.dtype,
        device=given.device,
        trust_remote_code=given.trust_remote_code,
        reward_weights=given.reward_weights,
    )
    if given.max_new_tokens is None:
        sampling = replace(sampling, max_new_tokens=models.load(models.choices[0]).ample_response)
    if given.terminal:
        TerminalChat(models, sampling, given.seed).run()
        return
    _serve(models, sampling, given, password)


def _serve(models: Models, sampling: Sampling, given: Any, password: str | None) -> None:
    from rlhf_lightning.app.page import build_page, is_local, serve

    prompts = [row.written for row in read_rows(given.prompts, "prompts")] if given.prompts else []
    examples = example_prompts(given.examples) if given.examples else []
    models.load(models.choices[0])
    judgements = Judgements(given.judgements)  # last, so that what is refused leaves no file
    page = build_page(models, judgements, prompts=prompts, examples=examples, sampling=sampling, seed=given.seed)
    address = serve(page, given.host, given.port, given.user, password)
    if not is_local(given.host):
        print(
            f"warning: everybody who reaches {given.host} and knows the password can use this machine's models; the "
            "connection is not encrypted",
            file=sys.stderr,
        )
    print(f"{', '.join(models.choices)} at {address}; judgements in {judgements.path}; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
        judgements.close()


def example_prompts(folder: str) -> list[str]:
    """The example prompt of a prepared folder, as a person would write it.

    Args:
        folder: made by `rlhf prepare`.

    Raises:
        UserError: there is none.
    """
    path = Path(folder).expanduser() / "example_prompt.json"
    try:
        example = json.loads(path.read_text(encoding="utf-8"))
        return [WrittenPrompt(example["prompt"]).text]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--examples: '{folder}' holds no example_prompt.json; pass a folder of `rlhf prepare`"
        ) from error
