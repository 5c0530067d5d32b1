"""Which room may import which: downwards only, without circles."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "rlhf_lightning"
FLOORS = (
    ("__main__", ""),
    ("cli",),
    ("app", "callbacks"),
    ("report",),
    ("evaluation", "planning"),
    ("algorithms", "data"),
    ("generation",),
    ("models",),
    ("forward",),
    ("training",),
    ("batches",),
    ("chat", "host", "rng", "runs", "warning_filters"),
    ("arguments", "caches", "compat", "lightning_compat", "yaml_text"),
    ("errors", "functional"),
)
STRATEGIES = re.compile(r"(ds_|deepspeed|fsdp|ddp|singledevice)\w*", re.IGNORECASE)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
FILES = {name.removesuffix("__init__").rstrip("."): path for name, path in FILES.items()}


def imports(name: str) -> set[str]:
    """Our modules that a module imports, also inside functions and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rlhf_lightning":
            module = (node.module or "").partition(".")[2]
            inner = [".".join(filter(None, (module, alias.name))) for alias in node.names]
            found |= {each if each in FILES else module for each in inner}
    return found - {name, ""}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_downwards(name):
    room = name.partition(".")[0]
    for other in imports(name):
        below = other.partition(".")[0]
        assert below == room or FLOOR_OF[room] < FLOOR_OF[below], f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    list(TopologicalSorter({name: imports(name) for name in FILES}).static_order())


@pytest.mark.parametrize("name", [name for name in FILES if name and not name.startswith("training")])
def test_the_names_of_strategies_are_known_in_training_alone(name):
    source = FILES[name].read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words = {token.string for token in tokens if token.type == tokenize.NAME}
    words |= {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}  # for getattr
    foreign = {word for word in words if isinstance(word, str) and STRATEGIES.fullmatch(word)}
    known = {"DeepSpeed"} | ({"deepspeed"} if name == "cli.env" else set())  # a logger, a package whose version is told
    assert not foreign - known
