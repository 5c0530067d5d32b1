"""What every test runs under: one thread, no network, the same examples each time.

`HYPOTHESIS_PROFILE=random` draws new examples, and more of them where a test names no number.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from getpass import getuser
from pathlib import Path

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["helpers.browser"]

torch.set_num_threads(1)
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.register_profile("random", max_examples=500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))


ROOT = Path(__file__).parents[1]
STARTERS = {"helpers.distributed", "helpers.forked", "helpers.torture"}
"""Modules whose functions start processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with files that start processes, which take longest, then those of most tests: `make test` deals out files
    in this order, so that no worker is left alone with a long one in the end."""
    tests = Counter(item.path for item in items)

    places: dict[Path, tuple[bool, int, str]] = {}
    for item in items:
        if item.path not in places:
            names = vars(getattr(item, "module", None) or object).values()
            quick = STARTERS.isdisjoint(getattr(value, "__module__", None) for value in names)
            places[item.path] = quick, -tests[item.path], str(item.path)
    items.sort(key=lambda item: places[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while modules are imported and tests collected, nor later among what was."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests prepare and compile stays out of the user's caches, and processes that they start find it.

    A process that is killed while it compiles leaves a lock there, for which all later ones wait. Code that torch
    generates is kept where torch would keep it.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{getuser()}"))
    for name in ("RLHF_LIGHTNING_CACHE", "TORCH_EXTENSIONS_DIR"):
        os.environ[name] = str(tmp_path_factory.mktemp(name.lower()))
    yield
    for name in ("RLHF_LIGHTNING_CACHE", "TORCH_EXTENSIONS_DIR"):
        del os.environ[name]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The lines that were logged so far, by Lightning's loggers too, which other tests may have silenced."""
    for logger in ("pytorch_lightning", "lightning_fabric"):  # either may carry the message; caplog listens at the root
        monkeypatch.setattr(logging.getLogger(logger), "propagate", True)
        caplog.set_level(logging.INFO, logger=logger)
    return lambda: caplog.messages


@pytest.fixture
def double_precision() -> Iterator[None]:
    """Whatever is loaded or drawn is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _no_seed_left_behind() -> Iterator[None]:
    """`seed_everything` writes the seed into the environment, whence the processes of later tests would take it."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True)
def _no_path_left_behind() -> Iterator[None]:
    """The command line, run in this process, finds modules of the working folder from then on, and keeps them."""
    path, modules = [*sys.path], set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = Path(str(getattr(sys.modules[name], "__file__", None)))
        if file.is_relative_to(tempfile.gettempdir()) and not file.is_relative_to(ROOT):  # which may lie there, too
            del sys.modules[name]
