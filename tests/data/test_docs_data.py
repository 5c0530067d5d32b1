"""Every example of docs/data.md, run as it stands there, and what it is said to teach."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    """A fenced block: its language, the name of the file it is, and its text."""

    language: str
    name: str
    text: str


def sections(page: str) -> dict[str, list[Block]]:
    """The fenced blocks of each `###` section, in order."""
    parts = re.split(r"^### (.+)$", page, flags=re.MULTILINE)
    fence = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    titles = zip(parts[1::2], parts[2::2], strict=True)
    return {title: [Block(*block) for block in fence.findall(part)] for title, part in titles}


SECTIONS = sections(PAGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the whole page: later examples use the files of earlier ones."""
    folder = tmp_path_factory.mktemp("page")
    tiny_tokenizer().save_pretrained(folder / "MODEL")
    for blocks in SECTIONS.values():
        for block in blocks:
            if block.name:
                (folder / block.name).write_text(block.text, encoding="utf-8")
    return folder


def in_one_line(pieces: list[dict[str, Any]]) -> str:
    return "".join(f"⟦{piece['text']}⟧" if piece["taught"] else piece["text"] for piece in pieces).replace("\n", "\\n")


def lines_of(report: Path) -> list[str]:
    """The examples of a report as the page writes them."""
    examples = json.loads(report.read_text(encoding="utf-8"))["examples"]
    texts = [" over ".join(in_one_line(pieces) for pieces in example["texts"].values()) for example in examples]
    return [f"{example['kind']:10}  {text}" for example, text in zip(examples, texts, strict=True)]


def test_the_page_shows_every_form_and_each_file_with_a_command_that_uses_it():
    assert len(SECTIONS) >= 16
    commands = "\n".join(block.text for blocks in SECTIONS.values() for block in blocks if not block.name)
    files = [block for blocks in SECTIONS.values() for block in blocks if block.name]
    configs = "\n".join(block.text for block in files if block.language == "yaml")
    for block in files:
        assert block.name in commands + configs
        assert block.name.endswith(f".{block.language}")
        if block.language == "jsonl":
            assert [json.loads(line) for line in block.text.splitlines()]
        if block.language == "csv":
            assert len(list(csv.DictReader(block.text.splitlines()))) >= 1


def commands(blocks: list[Block]) -> list[list[str]]:
    """The commands of a section, without `rlhf`."""
    lines = [shlex.split(line) for block in blocks if block.language == "bash" for line in block.text.splitlines()]
    assert all(words[0] == "rlhf" for words in lines)
    return [words[1:] for words in lines]


def prepare_what_is_read(title: str) -> None:
    """Run the commands of other sections whose folders a section reads, unless that is done: it may run by itself."""
    text = "".join(block.text for block in SECTIONS[title] if block.language == "python")
    for other in SECTIONS.values():
        for words in commands(other):
            out = words[words.index("--out") + 1]
            if f'"{out}"' in text and not Path(out).exists():
                main([*words, "--num_proc=1"])


@pytest.mark.parametrize("title", SECTIONS)
def test_an_example_of_the_page_runs_and_teaches_what_the_page_says(title, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    # Two thirds of the time, for pictures that nobody looks at here.
    monkeypatch.setattr("rlhf_lightning.data.preparing.report.draw_lengths", lambda path, *_: path.touch())
    prepare_what_is_read(title)
    reports: list[Path] = []
    for block in SECTIONS[title]:
        if block.language == "python":
            exec(compile(block.text, title, "exec"), {})
        for words in commands([block]):
            if not Path(words[words.index("--out") + 1]).exists():
                main([*words, "--num_proc=1"])
            reports.append(Path(words[words.index("--out") + 1]) / "report.json")
        if block.language == "text":
            assert [lines_of(report) for report in reports] == [block.text.splitlines()] * len(reports)
            reports = []
    capsys.readouterr()
