"""Every example of docs/finetuning.md is taken by the command line, or runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.stages import save_llama
from rlhf_lightning.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {name: text for language, name, text in BLOCKS if language == "yaml"}
COMMANDS = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf"])


def test_the_page_has_examples():
    assert len(FILES) >= 4
    assert len(COMMANDS) >= 2


@pytest.mark.parametrize("recipe", ["sft.yaml", "reward.yaml"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_page_stacks_on_a_recipe(capsys, tmp_path, recipe, name):
    (tmp_path / name).write_text(FILES[name])
    parsed = printed(capsys, "fit", "--config", recipe, "--config", str(tmp_path / name))
    given = yaml.safe_load(FILES[name])["model"]["init_args"]
    assert parsed["finetune"] == parsed["finetune"] | given["finetune"]
    assert parsed["gradient_checkpointing"] is given.get("gradient_checkpointing", False)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_taken(capsys, command):
    parsed = printed(capsys, *shlex.split(command)[1:])
    assert parsed["finetune"]["mode"] == "lora"
    assert parsed["optimizer"]["init_args"]["lr"] == 2e-4


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "MODEL")
    (code,) = [text for language, _, text in BLOCKS if language == "python"]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/finetuning.md", "exec"), names)
    names["module"].configure_model()
    trained = [name for name, p in names["module"].named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.finetune.mode=lora", "--model.finetune.rank=0"], "finetune.rank (0) must be at least 1"),
        (["--model.finetune.export=adapter"], "finetune.export adapter needs finetune.mode lora, not all"),
    ],
)
def test_settings_that_make_no_sense_end_in_one_line(capsys, options, message):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config=sft.yaml", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
