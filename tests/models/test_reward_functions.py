"""Python functions as rewards: whatever they are and return is right, or one line that names them."""

import asyncio
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.reward_functions import ScoringFunction, import_function, names_function

PROMPTS, ANSWERS, ROWS = ["a", "b", "c"], ["x", "yy", "zzz"], [30, 10, 20]
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
NUMBERS = [1.0, 0.0, 2.5]


def scores(function, timeout=None):
    return ScoringFunction(function, "mine", timeout)(PROMPTS, ANSWERS, MESSAGES, ROWS)


def returning(value):
    def mine(prompts, responses):
        return value

    return mine


def complaint(function, timeout=None):
    with pytest.raises(UserError) as error:
        scores(function, timeout)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize(
    "value",
    [
        NUMBERS,
        tuple(NUMBERS),
        [1, 0, Decimal("2.5")],
        [True, False, Fraction(5, 2)],
        [np.float32(1), np.int64(0), torch.tensor(2.5)],
        [[1.0], np.array([0.0]), torch.tensor([2.5])],
        np.array(NUMBERS),
        np.array(NUMBERS)[:, None],
        np.array(NUMBERS, dtype=object),
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS).unsqueeze(1),
        torch.tensor(NUMBERS, dtype=torch.bfloat16),
        torch.tensor(NUMBERS, requires_grad=True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_form_of_one_number_per_response_is_right(value, timeout):
    returned = scores(returning(value), timeout)
    assert returned == NUMBERS
    assert {type(score) for score in returned} == {float}


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=6), st.sampled_from(["list", "column", "tensor", "generator"])
)
def test_numbers_come_through_unchanged(values, form):
    def function(prompts, responses):
        as_form = {"list": list, "column": lambda v: np.array(v)[:, None], "tensor": torch.tensor, "generator": iter}
        return as_form[form](values)

    texts = [""] * len(values)
    returned = ScoringFunction(function, "mine")(texts, texts, [[]] * len(values), range(len(values)))
    np.testing.assert_array_equal(np.array(returned, dtype=np.float32), np.array(values, dtype=np.float32))


def test_a_generator_and_bools_and_callables_that_are_no_function():
    assert scores(lambda prompts, responses: (float(len(text)) for text in responses)) == [1.0, 2.0, 3.0]
    assert scores(lambda prompts, responses: [len(text) > 1 for text in responses]) == [0.0, 1.0, 1.0]

    class Judge:
        def __call__(self, prompts, responses, scale=2):
            return [scale * len(text) for text in responses]

    assert scores(Judge()) == [2.0, 4.0, 6.0]
    assert scores(partial(Judge(), scale=1)) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "returned None for 3 responses; return one number per response"),
        (1.0, "returned float 1.0 for 3 responses"),
        (torch.tensor(1.0), "returned float 1.0 for 3 responses"),
        (np.float64(1.0), "returned float 1.0 for 3 responses"),
        ("0.5", "returned str '0.5' for 3 responses"),
        ({0: 1.0}, "returned dict {0: 1.0} for 3 responses"),
        ({1.0, 2.0, 3.0}, "returned set {1.0, 2.0, 3.0} for 3 responses"),
        ([1.0, None, 2.0], "returned None for row 10; return one number per response"),
        ([1.0, 2.0, {"score": 1}], "returned dict {'score': 1} for row 20"),
        (["0.5", 1.0, 2.0], "returned str '0.5' for row 30"),
        ([[1.0, 2.0]] * 3, "returned list [1.0, 2.0] for row 30"),
        ([[], 1.0, 2.0], "returned list [] for row 30"),
        ([1j, 1.0, 2.0], "returned complex 1j for row 30"),
        ([10**400, 1.0, 2.0], "returned int 1000"),
        (torch.zeros(3, 2), "returned list [0.0, 0.0] for row 30"),
        ([1.0], "returned 1 scores for 3 responses"),
        (torch.zeros(1, 3), "returned 1 scores for 3 responses"),
        ([0.0] * 5, "returned 5 scores for 3 responses"),
        ((0.0 for _ in iter(int, 1)), "returned 4 scores for 3 responses"),
        (["x" * 200, 1.0, 2.0], f"returned str '{'x' * 59}... for row 30"),
    ],
    ids=lambda value: type(value).__name__,  # some values say where they lie in memory
)
def test_whatever_is_not_one_number_per_response_is_one_line(value, said):
    assert complaint(returning(value)).startswith(f"reward function 'mine' {said}")


def test_an_error_is_told_with_the_user_s_own_line():
    def raises(prompts, responses):
        raise KeyError("reference")

    def raises_in_a_library(prompts, responses):
        return [np.linalg.inv(np.zeros((2, 2))) for _ in responses]

    def raises_late(prompts, responses):
        yield 1.0
        raise RuntimeError("two\nlines")

    def times_out_itself(prompts, responses):
        raise TimeoutError("the judge is asleep")

    def exits(prompts, responses):
        sys.exit(3)

    for function, what, lines in [
        (raises, "raised KeyError: 'reference'", 1),
        (raises_in_a_library, "raised LinAlgError: Singular matrix", 1),
        (raises_late, "raised RuntimeError: two", 2),
        (times_out_itself, "raised TimeoutError: the judge is asleep", 1),
        (exits, "exited with 3", 1),
    ]:
        place = f"{__file__}:{function.__code__.co_firstlineno + lines}"
        for timeout in (None, 60.0):
            assert complaint(function, timeout) == f"reward function 'mine' {what} ({place})"


def test_a_function_that_does_not_end_is_left_after_its_time():
    stop = threading.Event()
    rows = list(range(20))

    def hangs(prompts, responses):
        stop.wait()
        return [0.0] * len(responses)

    function = ScoringFunction(hangs, "mine", 0.05)
    with pytest.raises(
        UserError, match=r"'mine' took more than 0.05 seconds \(reward_timeout\) over rows 0, .* 7 and 12"
    ):
        function([""] * 20, [""] * 20, [[]] * 20, rows)
    stop.set()
    assert scores(returning(NUMBERS), 60.0) == NUMBERS


def test_a_function_gets_lists_of_its_own_and_no_gradients():
    def greedy(prompts, responses):
        assert not torch.is_grad_enabled()
        taken = [float(len(responses.pop())) for _ in range(len(responses))]
        prompts.clear()
        return taken

    for timeout in (None, 60.0):
        assert scores(greedy, timeout) == [3.0, 2.0, 1.0]
    assert (PROMPTS, ANSWERS) == (["a", "b", "c"], ["x", "yy", "zzz"])


def test_a_function_computes_alike_with_and_without_a_time_limit(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((threading.current_thread(), device)))
    threads = []

    def product(prompts, responses):
        threads.append(threading.current_thread())
        return (torch.full((len(responses), 1), 1.001) @ torch.ones(1, 1)).squeeze(1)

    with torch.autocast("cpu", torch.bfloat16):
        assert scores(product) == scores(product, 60.0) == [float(torch.tensor(1.001))] * 3
    assert devices == [(threads[1], 3)]  # the process's own, where a new thread begins with the first


def test_messages_are_given_to_those_who_ask_for_them():
    seen = []

    def asks(prompts, responses, *, messages):
        seen.append(messages)
        return [0.0] * len(responses)

    def takes_anything(prompts, responses, **more):
        seen.append(more)
        return [0.0] * len(responses)

    scores(asks)
    scores(takes_anything)
    assert seen == [MESSAGES, {}]


class Judge:
    """A class where its instance is meant."""

    def __call__(self, prompts, responses):
        return [0.0] * len(responses)


async def judge_later(prompts, responses):
    return [0.0] * len(responses)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prompts: [0.0], r"takes \(prompts\), but is called with \(prompts, responses\)"),
        (lambda prompts, responses, key: [0.0], r"takes \(prompts, responses, key\), but is called with"),
        (Judge, "is a class; pass a function"),
        (judge_later, "is async, which cannot be awaited here"),
    ],
)
def test_what_cannot_be_called_is_refused_before_it_is(function, said):
    with pytest.raises(UserError, match=f"^reward function 'mine' {said}"):
        ScoringFunction(function, "mine")


def test_what_is_async_behind_another_function_is_named():
    assert complaint(lambda *texts: judge_later(*texts)).startswith("reward function 'mine' returned coroutine")
    assert asyncio.run(judge_later(PROMPTS, ANSWERS)) == [0.0] * 3


MODULE = """
import math
from collections import Counter
limit = 3
def polite(prompts, responses): return [1.0 for _ in responses]
def short(prompts, responses): return [2.0 for _ in responses]
def _hidden(prompts, responses): return [3.0 for _ in responses]
"""


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """A user's folder, which nothing has put on the import path."""
    modules = {
        "my_rewards_here": MODULE,
        "needs_more": "x = 1\nimport a_package_nobody_has\n",
        "needs_a_name": "import needs_its_neighbour\n",
        "needs_its_neighbour": "from my_rewards_here import nothing\n",
        "unfinished": "def polite(prompts, responses:\n",
        "leaves": "import sys\nsys.exit(4)\n",
        "tabnanny": "raise RuntimeError('this file is not the library')\n",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in modules.keys() - {"tabnanny"}:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", ["my_rewards_here.polite", "my_rewards_here:polite"])
def test_a_module_of_the_working_folder_is_found(working_folder, path):
    assert names_function(path)
    assert scores(import_function(path)) == [1.0] * 3


def test_a_file_of_the_working_folder_does_not_stand_in_for_a_library(working_folder):
    assert import_function("tabnanny.check").__module__ == "tabnanny"  # which nothing has imported yet


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "my_rewards_here.polit",
            "not found: module 'my_rewards_here' has no function 'polit'; did you mean 'polite'?; the functions of "
            "HERE/my_rewards_here.py: polite, short",
        ),
        ("my_rewards_here.limit", "module 'my_rewards_here' has no function 'limit', which is int 3; the functions of"),
        (
            "needs_more.f",
            "cannot be imported: ModuleNotFoundError: No module named 'a_package_nobody_has' (HERE/needs_m",
        ),
        ("needs_a_name.f", "cannot be imported: ImportError: cannot import name 'nothing'"),
        ("needs_a_name.f", "(HERE/needs_its_neighbour.py:1)"),
        ("unfinished.f", "cannot be imported: SyntaxError: '(' was never closed (unfinished.py, line 1)"),
        ("leaves.f", "cannot be imported: the module exits with 4 (HERE/leaves.py:2)"),
        (
            "my_reward_here.polite",
            "no module 'my_reward_here' in the working folder or on PYTHONPATH; did you mean 'my_rewards_here'?",
        ),
        ("my_rewards_here.polite.more", "there is no module 'my_rewards_here.polite'"),
    ],
)
def test_what_cannot_be_imported_is_told_apart(working_folder, path, said):
    with pytest.raises(UserError) as error:
        import_function(path)
    assert said.replace("HERE", str(working_folder)) in str(error.value)
    assert "\n" not in str(error.value)
