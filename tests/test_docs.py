"""What all pages have in common: files, names and options in them exist, links lead somewhere, commands parse."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

import rlhf_lightning
from rlhf_lightning.cli.errors import arguments_of
from rlhf_lightning.cli.main import main

ROOT = Path(__file__).parents[1]
PACKAGE = Path(rlhf_lightning.__file__).parent
PAGES = {str(page.relative_to(ROOT)): page.read_text("utf-8") for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
PAGES.pop("CHANGELOG.md")  # speaks of what was, too
ELSEWHERE = ("finetuning.md", "performance.md", "troubleshooting.md", "extending.md", "data.md")
"""Their tests try their commands themselves."""


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Every `rlhf fit` and its like in a page's blocks, in one line each."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"rlhf (fit|validate|test|predict) ", line)]


@cache
def defined(file: Path) -> set[str]:
    """Names of functions, classes, methods and constants of a file."""
    nodes = [*ast.walk(ast.parse(file.read_text("utf-8")))]
    names = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return names | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist_and_hold_the_names(page):
    for path, name in re.findall(r"`([\w/]+/\w+\.py)(?:: (\w+))?`", prose(page)):
        files = [file for file in (ROOT / path, PACKAGE / path) if file.exists()]
        assert files, f"{page} names {path}"
        assert not name or name in defined(files[0]), f"{page} names {name} in {path}"


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\((?!http)([^)#]*)(#([\w-]+))?\)", prose(page)):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, anchor


TRIED = [(page, line) for page in PAGES if Path(page).name not in ELSEWHERE for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), TRIED, ids=[f"{Path(page).stem}{i}" for i, (page, _) in enumerate(TRIED)])
def test_a_command_of_a_page_is_taken(capsys, monkeypatch, page, line):
    words = shlex.split(line, comments=True)[1:]
    monkeypatch.setattr("sys.argv", ["rlhf"])
    if not {"--help", "--print_config"} & {*words}:
        words.append("--print_config")
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["Reward model", "DPO", "RLOO", "GRPO"])
def test_options_of_an_algorithm_exist(algorithm):
    (section,) = re.findall(rf"^## {algorithm}\n(.*?)(?=^## )", PAGES["docs/algorithms.md"], re.MULTILINE | re.DOTALL)
    algorithm = algorithm.removesuffix(" model")
    named = set(re.findall(r"`([a-z_.]+)(?:: [\w.]+)?`", section)) - set(re.findall(r"`[\w/]+\.py: (\w+)`", section))
    known = {name.removeprefix("model.") for name in arguments_of(f"rlhf_lightning.{algorithm}Module", "model")}
    assert len(named & known) > 2
    assert named - known <= {"loss"}  # the value of kl_in


def test_sources_that_are_named_are_listed():
    page = PAGES["docs/algorithms.md"]
    body, _, listed = page.partition("## Sources")
    named = set(re.findall(r"\b([A-Z][a-z]+ 20\d\d)\b", body))
    assert named == set(re.findall(r"^- ([A-Z][a-z]+ 20\d\d):", listed, re.MULTILINE))
