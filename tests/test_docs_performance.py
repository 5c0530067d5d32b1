"""Every example of docs/performance.md is taken by the command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from rlhf_lightning.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {name: text for language, name, text in BLOCKS if language == "yaml"}
COMMANDS = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf"])


@pytest.mark.parametrize(
    "name", ["budget.yaml", "shared.yaml", "small.yaml", "on_policy.yaml", "layers.yaml", "compiled.yaml"]
)
def test_a_file_of_the_page_stacks_on_the_recipe(capsys, tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    parsed = printed(capsys, "fit", "--config", "ppo.yaml", "--config", str(tmp_path / name))
    given = yaml.safe_load(FILES[name])["model"]["init_args"]
    expected = {key: parsed[key] | value if isinstance(value, dict) else value for key, value in given.items()}
    assert parsed == parsed | expected


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_taken(capsys, command):
    assert printed(capsys, *shlex.split(command)[1:])["finetune"]["mode"] == "lora"


def test_there_is_no_other_example():
    assert len(FILES) == 6
    assert len(COMMANDS) == 2
