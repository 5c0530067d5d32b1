"""docs/troubleshooting.md names what exists, and every warning; docs/index.md names every page."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf_lightning
from rlhf_lightning.cli.errors import arguments_of
from rlhf_lightning.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
OPTIONS = sorted(set(re.findall(r"--((?:model|data|trainer)\.[\w.]*\w)", PAGE)))
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
OWNERS = {
    "model": ["rlhf_lightning.SFTModule", "rlhf_lightning.RewardModule", "rlhf_lightning.PPOModule"],
    "data": ["rlhf_lightning.InstructionDataModule", "rlhf_lightning.PromptDataModule"],
    "trainer": ["pytorch_lightning.Trainer"],
}


def text_of(node: ast.expr) -> str | None:
    """A string as it is written; None for anything else. What is filled in is a line break, which no page holds."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
    return None


def expressions() -> Iterator[ast.expr]:
    """Every expression of the package."""
    for file in Path(rlhf_lightning.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.expr):
                yield node


@functools.cache
def strings() -> tuple[list[str], list[str]]:
    """All strings of the package, and of them the warnings whose words stand in the call itself."""
    found: list[str] = []
    warnings: list[str] = []
    for node in expressions():
        if text := text_of(node):
            found.append(text)
        warns = isinstance(node, ast.Call) and name_of(node.func) in ("rank_zero_warn", "_warn_once")
        if warns and (text := text_of(node.args[0])) and text.strip():
            warnings.append(text)
    return found, warnings


def name_of(function: ast.expr) -> str | None:
    """What a call calls, without whose it is."""
    return getattr(function, "attr", None) or getattr(function, "id", None)


def messages(heading: str) -> list[str]:
    """First column of a section's table."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return re.findall(r"^\| `([^|]*)` \|", section, re.M)


def says(text: str, fragment: str) -> bool:
    """Whether a message holds a fragment, in which … stands for anything."""
    return re.search(".*".join(map(re.escape, fragment.split(" … "))), text, re.S) is not None


def test_every_option_of_the_page_exists():
    known = {name for key, owners in OWNERS.items() for owner in owners for name in arguments_of(owner, key)}
    known.add("model.optimizer.lr")  # of the class that the recipes name
    assert len(OPTIONS) > 20
    assert [option for option in OPTIONS if option not in known] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_taken(capsys, monkeypatch, command):
    monkeypatch.setattr("sys.argv", ["rlhf"])
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command)[1:], "--print_config"])
    assert end.value.code == 0


def test_every_metric_of_the_page_is_documented():
    documented = (DOCS / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:train|val)/\w+)`", PAGE))
    assert len(named) > 10
    assert [name for name in named if f"`{name}`" not in documented] == []


@pytest.mark.parametrize("heading", ["Resuming", "Numbers that are not finite", "What each warning means"])
def test_every_message_of_the_page_is_one_of_ours(heading):
    named = messages(heading)
    assert len(named) > 3
    # A message may be put together of several strings, so each side of … may stand in another.
    missing = [part for name in named for part in name.split(" … ") if not any(part in text for text in strings()[0])]
    assert missing == []


def test_every_warning_is_on_the_page():
    _, warnings = strings()
    named = messages("What each warning means")
    assert len(warnings) > 20
    assert [warning for warning in warnings if not any(says(warning, name) for name in named)] == []


def test_the_index_names_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", index)
    assert [link for link in links if not (DOCS / link).exists()] == []
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= set(links)


def test_links_within_the_page_lead_somewhere():
    for file, anchor in re.findall(r"\]\(([\w.]*)#([\w-]+)\)", PAGE):
        headings = re.findall(r"^#+ (.+)$", (DOCS / (file or "troubleshooting.md")).read_text(encoding="utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
