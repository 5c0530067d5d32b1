"""The models of a page or a terminal: loaded when they are first asked, and run one at a time by one thread.

One thread, because the models share the machine, and because a model that is answering must not be used otherwise.
"""

from __future__ import annotations

import queue
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import torch

from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.judge import Judge, TokenScore
from rlhf_lightning.evaluation.policy import Answer, Dtype, Policy
from rlhf_lightning.generation.engine import TransformersEngine
from rlhf_lightning.generation.sampling import Sampling

_CONFIGS = ("config.json", "adapter_config.json")


class Ask(NamedTuple):
    """One answer that is wanted.

    Attributes:
        model: one of the choices.
        written: the prompt.
        place: what tells the answer from others with the same seed.
    """

    model: str
    written: WrittenPrompt
    place: tuple[int | str, ...] = ()


class Verdict(NamedTuple):
    """What the reward says of an answer.

    Attributes:
        score: of the whole.
        tokens: the score of the answer up to each token; none where a function scores.
    """

    score: float
    tokens: list[TokenScore]


def model_folders(name: str) -> list[str]:
    """The models that a name stands for: itself, or the exports of a run, those of its checkpoints too.

    Args:
        name: a model folder, the folder of a run, or a hub id.

    Raises:
        UserError: a folder without a model in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() or any((folder / config).is_file() for config in _CONFIGS):
        return [name]
    found = [
        str(place)
        for place in [folder / "export", *sorted(folder.glob("checkpoints/*-hf"))]
        if any((place / config).is_file() for config in _CONFIGS)
    ]
    if not found:
        raise UserError(f"'{name}' holds no model; pass a Hugging Face folder, a run with an export, or a hub id")
    return found


class Models:
    """The models that may be asked, and the reward that says how good the answers are.

    Args:
        names: model folders, folders of runs, or hub ids.
        reward: folder or hub id of a reward model, or import path of a function; None for no scores.
        dtype: of the weights, see `Policy.load`; `auto` on a CPU also lets answers be written from copies in bfloat16,
            nearly twice as fast.
        device: where they run; see `Policy.load`.
        trust_remote_code: allow folders to run Python code of their own.
        reward_weights: what the labels of a reward model count; None where it has one.

    Attributes:
        choices: what may be asked, the exports of a run one by one.

    Raises:
        UserError: a folder without a model, or no such reward.
    """

    def __init__(
        self,
        names: Sequence[str],
        reward: str | None = None,
        *,
        dtype: Dtype = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        reward_weights: dict[str, float] | None = None,
    ) -> None:
        self.choices = list(dict.fromkeys(folder for name in names for folder in model_folders(name)))
        self._dtype, self._device, self._trust = dtype, device, trust_remote_code
        self._loaded: dict[str, Policy] = {}
        self._worker = ThreadPoolExecutor(1, "models")
        self.judge: Judge | None = None
        if reward is not None:
            options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
            self.judge = Judge.load(reward, weights=reward_weights, **options)

    def load(self, model: str) -> Policy:
        """A model, loaded if it is not yet, and made ready to answer at once.

        Args:
            model: one of the choices.

        Raises:
            UserError: there is no language model there.
        """
        return self._worker.submit(self._policy, model).result()

    def _policy(self, model: str) -> Policy:
        if model not in self.choices:
            raise UserError(f"'{model}' is none of the models here: {', '.join(self.choices)}")
        if model not in self._loaded:
            policy = Policy.load(model, dtype=self._dtype, device=self._device, trust_remote_code=self._trust)
            if self._dtype == "auto":
                policy.engine = TransformersEngine(policy.model, policy.tokenizer, half_weights=True)
            # What is tested once for each model is not waited for by the first who asks.
            policy.answer([WrittenPrompt("a")], Sampling(max_new_tokens=1))
            self._loaded[model] = policy
        return self._loaded[model]

    def fits(self, ask: Ask, max_new_tokens: int) -> bool:
        """Whether the model reads the whole prompt.

        Args:
            ask: what is asked.
            max_new_tokens: room for the answer.
        """
        return self.load(ask.model).fits(ask.written, max_new_tokens)

    def stream(
        self, asks: Sequence[Ask], sampling: Sampling, seed: int, stopped: Event | None = None
    ) -> Generator[list[Answer]]:
        """Answers as far as they have got, again and again; several models take turns, token by token.

        Args:
            asks: answers that are wanted.
            sampling: how they are drawn.
            seed: the same for the same answers.
            stopped: ends the answers where they are.

        Raises:
            UserError: a prompt that a model cannot read.
        """
        left = Event()
        ends = (left,) if stopped is None else (left, stopped)
        answers: queue.SimpleQueue[list[Answer] | None] = queue.SimpleQueue()
        job = self._worker.submit(self._answer, asks, sampling, seed, ends, answers)
        job.add_done_callback(lambda _: answers.put(None))
        try:
            while (latest := answers.get()) is not None:
                while not answers.empty() and (newer := answers.get()) is not None:
                    latest = newer
                yield latest
                if job.done() and answers.empty():
                    break
            job.result()
        finally:
            left.set()

    def _answer(
        self,
        asks: Sequence[Ask],
        sampling: Sampling,
        seed: int,
        ends: Sequence[Event],
        answers: queue.SimpleQueue[list[Answer] | None],
    ) -> None:
        latest: dict[int, Answer] = {}
        with ExitStack() as stack:
            running = []
            for model in dict.fromkeys(ask.model for ask in asks):
                policy, places = self._policy(model), [i for i, ask in enumerate(asks) if ask.model == model]
                random = policy.row_generators(seed, [asks[i].place for i in places])
                steps = policy.stream([asks[i].written for i in places], sampling, random)
                running.append((places, stack.enter_context(closing(steps))))
            while running and not any(end.is_set() for end in ends):
                for places, steps in list(running):
                    step = next(steps, None)
                    if step is None:
                        running.remove((places, steps))
                    else:
                        latest.update(zip(places, step, strict=True))
                if len(latest) == len(asks):
                    answers.put([latest[i] for i in range(len(asks))])

    def verdict(self, written: WrittenPrompt, response: str, ended: bool = True) -> Verdict | None:
        """What the reward says of an answer; None where there is none.

        Args:
            written: the prompt.
            response: the answer.
            ended: whether it ended by itself.
        """
        return None if self.judge is None else self._worker.submit(self._verdict, written, response, ended).result()

    @torch.no_grad()
    def _verdict(self, written: WrittenPrompt, response: str, ended: bool) -> Verdict:
        assert self.judge is not None
        score = self.judge.scores([written], [response], [ended]).item()
        return Verdict(score, self.judge.token_scores(written, response, ended))
