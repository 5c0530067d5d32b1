"""Python functions as rewards: found by their import path, called, and their answers checked one by one.

Whatever a function does wrong (no number, too few numbers, an error, an exit, no end) ends in one line that names it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from itertools import islice
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rlhf_lightning.errors import UserError

RewardFunction = Callable[..., Sequence[float]]
"""`(prompts, responses) -> scores`, one number per response; one that has a parameter `messages` is given those too.

One with a parameter `token_ids` is given the ids of each response's tokens, its end included, and returns for each
response a list of one number per token.
"""
_WANTED = "return one number per response"
_WANTED_OF_TOKENS = "return for each response a list of one number per token (token_ids)"
_OFFERED = "messages", "token_ids"
_SHOWN = 60  # characters of what a function returned
_NAMED = 8  # rows, or names of a module, that a message lists


class ScoringFunction:
    """A function with its name, whatever it returns made numbers.

    Args:
        function: `(prompts, responses) -> scores`.
        name: how error messages call it.
        timeout: seconds that one call may take; None for no limit.

    Attributes:
        takes_messages: it has a parameter named `messages`.
        takes_token_ids: it has one named `token_ids`, and scores tokens.

    Raises:
        UserError: it is a class, or cannot be called with prompts and responses.
    """

    def __init__(self, function: RewardFunction, name: str, timeout: float | None = None) -> None:
        self.function, self.name, self.timeout = function, name, timeout
        taken = self._check_signature()
        self.takes_messages, self.takes_token_ids = (name in taken for name in _OFFERED)

    def _check_signature(self) -> list[str]:
        """What it takes beside prompts and responses."""
        if inspect.isclass(self.function):
            raise UserError(f"reward function '{self.name}' is a class; pass a function of prompts and responses")
        if inspect.iscoroutinefunction(self.function):
            raise UserError(
                f"reward function '{self.name}' is async, which cannot be awaited here; write it with `def`"
            )
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # some functions written in C do not say
            return []
        taken = [name for name in _OFFERED if name in signature.parameters]
        try:
            signature.bind([], [], **{name: [] for name in taken})
        except TypeError as error:
            raise UserError(
                f"reward function '{self.name}' takes {signature}, but is called with (prompts, responses), and with "
                f"messages=... and token_ids=... if it has parameters of those names: {error}"
            ) from error
        return taken

    def __call__(
        self, prompts: list[str], responses: list[str], messages: list[Any], rows: Sequence[int]
    ) -> list[float]:
        """One number per response.

        Args:
            prompts: text of each prompt.
            responses: text of each response.
            messages: each prompt as messages; handed over where the function asks for them.
            rows: number of each prompt's row in the data, for error messages.

        Raises:
            UserError: the function raised, exited, took too long, or did not return one number per response.
        """
        if self.takes_token_ids:
            raise UserError(
                f"reward function '{self.name}' scores the tokens of a policy (token_ids), and here are texts "
                "alone: give one that scores responses"
            )
        returned = self._call(prompts, responses, messages, rows)
        numbers = [_number(item) for item in returned]
        for item, number, row in zip(returned, numbers, rows, strict=True):
            if number is None:
                raise self._not_numbers(f"returned {_said(item)} for row {row}")
        return [number for number in numbers if number is not None]

    def of_tokens(
        self,
        prompts: list[str],
        responses: list[str],
        messages: list[Any],
        rows: Sequence[int],
        token_ids: list[list[int]],
    ) -> list[list[float]]:
        """For each response one number per token, of a function that `takes_token_ids`.

        Args:
            prompts: as in a call.
            responses: likewise.
            messages: likewise.
            rows: likewise.
            token_ids: of each response, its end included.

        Raises:
            UserError: as in a call, or other numbers than tokens.
        """
        found, given = [], [list(ids) for ids in token_ids]
        returned = self._call(prompts, responses, messages, rows, given)
        for item, ids, row in zip(returned, token_ids, rows, strict=True):
            numbers = _listed(item, len(ids))
            if not isinstance(numbers, list):
                raise self._not_numbers(f"returned {_said(item)} for row {row}")
            if len(numbers) != len(ids):
                raise UserError(
                    f"reward function '{self.name}' returned {len(numbers)} scores for the {len(ids)} tokens of row "
                    f"{row}"
                )
            scores = [_number(number) for number in numbers]
            if None in scores:
                raise self._not_numbers(f"returned {_said(numbers[scores.index(None)])} for a token of row {row}")
            found.append([score for score in scores if score is not None])
        return found

    def _call(
        self,
        prompts: list[str],
        responses: list[str],
        messages: list[Any],
        rows: Sequence[int],
        token_ids: list[list[int]] | None = None,
    ) -> list[Any]:
        """What the function returns, an item for each response."""
        more: dict[str, Any] = {"messages": messages} if self.takes_messages else {}
        more |= {} if token_ids is None else {"token_ids": token_ids}

        def call() -> Any:
            # Lists of its own, which the function may change; computed alike in whichever thread this runs, without
            # the trainer's autocast, of which a thread of its own knows nothing.
            with torch.no_grad(), _without_autocast():
                return _listed(self.function(list(prompts), list(responses), **more), len(responses))

        try:
            returned = call() if self.timeout is None else _in_time(call, self.timeout)
        except TimeoutError as error:
            if error.args != (_LATE,):
                raise self._raised(error) from error
            raise UserError(
                f"reward function '{self.name}' took more than {self.timeout:g} seconds (reward_timeout) over "
                f"{_named(rows)}; the run ends here, and a checkpoint goes on from where it was written"
            ) from error
        except (Exception, SystemExit) as error:
            raise self._raised(error) from error
        if not isinstance(returned, list):
            raise self._not_numbers(f"returned {_said(returned)} for {len(responses)} responses")
        if len(returned) != len(responses):
            raise UserError(
                f"reward function '{self.name}' returned {len(returned)} scores for {len(responses)} responses"
            )
        return returned

    def _raised(self, error: BaseException) -> UserError:
        what = f"exited with {error.code!r}" if isinstance(error, SystemExit) else f"raised {_brief(error)}"
        return UserError(f"reward function '{self.name}' {what} ({_where(error, self.function)})")

    def _not_numbers(self, what: str) -> UserError:
        wanted = _WANTED_OF_TOKENS if self.takes_token_ids else _WANTED
        return UserError(f"reward function '{self.name}' {what}; {wanted}")


@contextmanager
def _without_autocast() -> Iterator[None]:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


_LATE = "a reward function took too long"


def _in_time(call: Callable[[], Any], seconds: float) -> Any:
    """What a call returns or raises.

    It runs in a thread, which works on every system and beside whatever signals the function or the trainer uses. A
    thread cannot be ended from outside; as a daemon it goes with the process.

    Raises:
        TimeoutError: it is not done in time.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:  # that of this process, for a new thread has the first
            torch.cuda.set_device(device)
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True, name="reward function").start()
    try:
        returned, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(_LATE) from None
    if error is not None:
        raise error
    return returned


def _listed(returned: Any, count: int) -> Any:
    """What a function returned as a list, `count + 1` items of what has no length; anything but a sequence as it is."""
    returned = _plain(returned)
    if isinstance(returned, str | bytes | Mapping | Set) or not isinstance(returned, Iterable):
        if inspect.iscoroutine(returned):
            returned.close()
        return returned
    return list(returned if hasattr(returned, "__len__") else islice(returned, count + 1))


def _plain(value: Any) -> Any:
    """Python's numbers and lists for a tensor or array, wherever it lives and whatever made it."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    return value.tolist() if hasattr(value, "tolist") else value


def _number(item: Any) -> float | None:
    """A score as a number, itself or alone in a list, array or tensor; None for anything else."""
    item = _plain(item)
    if isinstance(item, list | tuple) and len(item) == 1:
        item = _plain(item[0])
    try:
        return float(item) if isinstance(item, Real | Decimal) else None
    except (OverflowError, ValueError):  # an integer beyond any float, a signalling NaN
        return None


def _said(value: Any) -> str:
    """A value as a message shows it, its type first unless that is plain."""
    if value is None:
        return "None"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"


def _named(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"rows {', '.join(str(row) for row in rows[:_NAMED])}{more}"


def _brief(error: BaseException) -> str:
    """An error as the last line of its traceback has it, of several lines the first."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _where(error: BaseException, function: Any) -> str:
    """The line that raised: the last of the function's own file, which its author can look at."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def names_function(reward: str) -> bool:
    """Whether a string could be the import path of a function rather than a folder or hub id.

    Example:
        >>> names_function("my_rewards.polite"), names_function("my_rewards:polite"), names_function("owner/name")
        (True, True, False)
    """
    parts = reward.replace(":", ".").split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts) and not os.path.isdir(reward)


def import_from_working_folder() -> None:
    """Let modules of the working folder be imported from now on.

    It comes behind everything else, so that a file there never stands in for a library's module.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def import_function(path: str) -> RewardFunction:
    """Import `package.module.function` or `package.module:function`, from the working folder too.

    Args:
        path: an import path.

    Raises:
        UserError: there is no such module, it cannot be imported, or it has no such function.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    import_from_working_folder()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UserError(_no_module(path, error.name)) from error
        raise _not_imported(path, error) from error
    except (Exception, SystemExit) as error:
        raise _not_imported(path, error) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(_no_function(path, module, name))
    return function


def _no_module(path: str, name: str) -> str:
    here = sorted(file.stem for file in Path().glob("*.py"))
    return (
        f"reward '{path}' is neither a reward model folder nor the import path of a function: there is no module "
        f"'{name}' in the working folder or on PYTHONPATH{_did_you_mean(name, here)}"
    )


def _not_imported(path: str, error: BaseException) -> UserError:
    """An error of the user's own module, at the line of it that is the last to blame."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}"
    if isinstance(error, SyntaxError):
        return UserError(f"reward function '{path}' cannot be imported: {_brief(error)} ({error.filename})")
    what = f"the module exits with {error.code!r}" if isinstance(error, SystemExit) else _brief(error)
    return UserError(f"reward function '{path}' cannot be imported: {what} ({place})")


def _no_function(path: str, module: ModuleType, name: str) -> str:
    known = [
        key
        for key, value in vars(module).items()
        if inspect.isroutine(value) and not key.startswith("_") and value.__module__ == module.__name__
    ]
    listed = ", ".join(known[:_NAMED]) + (", ..." if len(known) > _NAMED else "") if known else "none"
    instead = f", which is {_said(getattr(module, name))}" if hasattr(module, name) else ""
    return (
        f"reward function '{path}' not found: module '{module.__name__}' has no function '{name}'{instead}"
        f"{_did_you_mean(name, known)}; the functions of {getattr(module, '__file__', None) or 'this module'}: {listed}"
    )


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
