"""What a task of an evaluation is, and what all of them are given."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf_lightning.data.rows import Need
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.judge import Judge
from rlhf_lightning.evaluation.policy import Dtype, Policy
from rlhf_lightning.evaluation.results import Curve, Lines, Result, key_of_settings
from rlhf_lightning.evaluation.rows import TextRow
from rlhf_lightning.generation.sampling import Sampling
from rlhf_lightning.models.reward_functions import RewardFunction, import_function, names_function
from rlhf_lightning.models.rewarding import find_reward

Progress = Callable[[float], None]
"""Told how many rows are done so far; parts of rows count."""
Report = Callable[[str, int], Progress]
"""Told what is done now, and of how many rows, 0 where that is not known; gives what is told of the progress."""
Ask = Callable[[list[int], Progress], list[dict[str, Any]]]
"""Gives what is to be written of some rows, by their places; may tell its progress meanwhile."""


def no_report(what: str, total: int) -> Progress:
    """Says nothing.

    Args:
        what: is done now.
        total: rows of it.
    """
    return lambda done: None


@dataclass
class Bench:
    """What tasks are given beside the rows: models by name, how answers are drawn, and how much is done at once.

    Args:
        policies: names of the language models that are evaluated: folders or hub ids.
        rewards: names of the reward models, or reward functions, that are evaluated or judge.
        reference: name of the language model that others are measured against; None for none.
        sampling: how answers are drawn.
        batch_size: prompts answered at once.
        max_tokens: read at once, padding included.
        dtype: of the weights.
        trust_remote_code: allow folders to run Python code of their own.
        seed: of all that is drawn.
        report: told of the progress.
        device: where they run; None for the first GPU if there is one, else the CPU.
        timeout: seconds that one call of a reward function may take; None for no limit.
        reward_weights: what the labels of reward models count, by the names of these.
    """

    policies: Sequence[str] = ()
    rewards: Sequence[str | RewardFunction] = ()
    reference: str | None = None
    sampling: Sampling = Sampling()
    batch_size: int = 32
    max_tokens: int = 8192
    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    seed: int = 42
    report: Report = no_report
    device: str | None = None
    timeout: float | None = None
    reward_weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    _loaded: dict[tuple[str, Any], Policy | Judge] = field(default_factory=dict)

    def policy(self, name: str) -> Policy:
        """A language model; the two that were asked for last are kept.

        Args:
            name: folder or hub id.

        Raises:
            UserError: there is none.
        """
        return self._keep("policy", name, lambda: Policy.load(name, batch_size=self.batch_size, **self._loading))

    def judge(self, reward: str | RewardFunction) -> Judge:
        """A reward model or function; the two that were asked for last are kept.

        Args:
            reward: see `Judge.load`.

        Raises:
            UserError: there is none.
        """
        options = {"timeout": self.timeout, "weights": self._weights_of(reward), **self._loading}
        return self._keep("judge", reward, lambda: Judge.load(reward, **options))

    def find(self, reward: str | RewardFunction) -> None:
        """Refuse a reward that is not there, or cannot score; quick, no weights are read.

        Args:
            reward: see `Judge.load`.

        Raises:
            UserError: says why.
        """
        find_reward(reward, weights=self._weights_of(reward))

    def files_of_reward(self, reward: str | RewardFunction) -> Any:
        """What decides the scores of a reward, for keys: its files, and what its labels count.

        Args:
            reward: see `Judge.load`.
        """
        weights = self._weights_of(reward)
        return files_of(reward) if weights is None else [files_of(reward), dict(weights)]

    def _weights_of(self, reward: str | RewardFunction) -> Mapping[str, float] | None:
        return self.reward_weights.get(reward) if isinstance(reward, str) else None

    @property
    def _loading(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device": self.device, "trust_remote_code": self.trust_remote_code}

    def _keep(self, kind: str, name: Any, load: Callable[[], Any]) -> Any:
        model = self._loaded.pop((kind, name), None)
        if model is None:
            others = [place for place in self._loaded if place[0] == kind]
            for place in others[:-1]:
                del self._loaded[place]  # before the next is loaded, so that no more than two are held
            self.report(f"loading {name_of(name)}", 0)
            model = load()
        self._loaded[kind, name] = model
        return model

    def check_policies(self, task: str) -> None:
        """Refuse a task for which there is no language model.

        Args:
            task: its name.

        Raises:
            UserError: says how to name one.
        """
        if not self.policies:
            raise UserError(f"{task} needs models; name language models, folders or hub ids, with --models")

    def check_rewards(self, task: str) -> None:
        """Refuse a task for which there is no reward.

        Args:
            task: its name.

        Raises:
            UserError: says how to name one.
        """
        if not self.rewards:
            raise UserError(f"{task} needs rewards; name reward models' folders or functions with --rewards")


class Task(ABC):
    """One kind of measurement: a dataclass whose fields are its options.

    Attributes:
        name: as users ask for it.
        need: what its rows must hold.
    """

    name: ClassVar[str]
    need: ClassVar[Need]

    def by_default(self, bench: Bench) -> bool:
        """Whether it is done where no tasks are named.

        Args:
            bench: what there is to measure.
        """
        return False

    def check(self, bench: Bench) -> None:  # noqa: B027, some tasks ask for nothing
        """Refuse to begin where something is missing, before anything is loaded.

        Args:
            bench: what there is to measure.

        Raises:
            UserError: says what.
        """

    @abstractmethod
    def run(self, rows: list[TextRow], bench: Bench, lines: Lines) -> tuple[list[Result], list[Curve]]:
        """Measure.

        Args:
            rows: to measure on.
            bench: models, and how they are asked.
            lines: where what is found of each row is written, and found again.

        Raises:
            UserError: something the user can fix.
        """

    def each_row(
        self,
        model: str,
        key: str,
        rows: Sequence[TextRow],
        pieces: Iterable[list[int]],
        ask: Ask,
        bench: Bench,
        lines: Lines,
    ) -> list[dict[str, Any]]:
        """The lines of all rows under the task's name, see `each_row`.

        Args:
            model: whose lines they are.
            key: of their settings.
            rows: all of them.
            pieces: places of the rows that are asked about together.
            ask: gives what is to be written of the rows of a piece.
            bench: whose progress is told.
            lines: where they are kept.
        """
        return each_row(self.name, model, key, rows, pieces, ask, bench, lines)

    def key(self, model: Any, *more: Any) -> str:
        """Hash of what decides the lines of one model: the task with its options, the model's files, and more.

        Args:
            model: name of a model, or a function.
            *more: whatever else decides, such as the seed.
        """
        options: dict[str, Any] = asdict(self) if is_dataclass(self) else {}
        return key_of_settings(self.name, options, files_of(model), *[files_of(each) for each in more])


def each_row(
    name: str,
    model: str,
    key: str,
    rows: Sequence[TextRow],
    pieces: Iterable[list[int]],
    ask: Ask,
    bench: Bench,
    lines: Lines,
) -> list[dict[str, Any]]:
    """The lines of all rows, in their order: those made before, and the others, asked for piece by piece.

    A piece is made whole or not at all, so that one that is made after a stop is the piece it would have been.

    Args:
        name: what is made.
        model: whose lines they are.
        key: of their settings.
        rows: all of them.
        pieces: places of the rows that are asked about together; each place stands in one.
        ask: gives what is to be written of the rows of a piece, in its order.
        bench: whose progress is told.
        lines: where they are kept.
    """
    known = lines.made_before(name, model, key)
    told = bench.report(f"{name} of {model}", len(rows))
    done = 0
    for piece in pieces:
        if not all(rows[place].row in known for place in piece):
            said = ask(piece, lambda part, before=done: told(before + part))  # type: ignore[misc]
            about = {"metric": name, "model": model}
            made = [{**about, "row": rows[i].row, "key": key, **one} for i, one in zip(piece, said, strict=True)]
            known.update({line["row"]: line for line in lines.add(made)})
        done += len(piece)
        told(done)
    return [known[row.row] for row in rows]


def name_of(model: Any) -> str:
    """How results call a model or a function."""
    return model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__)


def files_of(model: Any) -> Any:
    """A folder's files with sizes and times, which change when it is trained anew; anything else as it is.

    Of a function that is named by its import path the file that it stands in, which changes when it is written anew.
    """
    if not isinstance(model, str):
        return asdict(model) if is_dataclass(model) and not isinstance(model, type) else model
    if (folder := Path(model).expanduser()).is_dir():
        place, files = str(folder.absolute()), sorted(path for path in folder.iterdir() if path.is_file())
    else:
        place, files = model, _files_of_function(model)
    return [place, *((path.name, (s := path.stat()).st_size, s.st_mtime_ns) for path in files)] if files else model


def _files_of_function(name: str) -> list[Path]:
    if not names_function(name):
        return []
    try:
        code = getattr(inspect.unwrap(import_function(name)), "__code__", None)
    except UserError:  # it was no function
        return []
    return [path for path in [Path(code.co_filename)] if path.is_file()] if code is not None else []
