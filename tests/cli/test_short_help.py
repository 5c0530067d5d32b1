"""`rlhf fit --help`: short, at once, with the values of the recipe."""

from __future__ import annotations

import re

import pytest
import pytorch_lightning as pl
from jsonargparse import ArgumentParser

from rlhf_lightning.cli.errors import arguments_of
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.recipes import find_recipe, read_config, resolve_recipes, stage_recipes
from rlhf_lightning.cli.short_help import RUN, TRAINER, short_help
from rlhf_lightning.compat import parser_actions

STAGES = ["sft.yaml", "reward.yaml", "ppo.yaml", "rloo.yaml", "grpo.yaml", "dpo.yaml"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as the help becomes, whatever terminal the tests run on."""
    monkeypatch.setenv("COLUMNS", "120")


def shown(*options: str, command: str = "fit") -> str:
    return short_help(command, resolve_recipes(options))


@pytest.mark.parametrize("recipe", STAGES)
def test_it_fits_on_a_few_screens_and_names_every_option_of_the_classes(recipe):
    text = shown("--config", recipe)
    lines = text.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120
    named = set(re.findall(r"^ +(?:--)?([\w.]+)", text, re.MULTILINE))
    config = read_config(find_recipe(recipe))
    for part in ("model", "data"):
        expected = {key for key in arguments_of(config[part]["class_path"], part) if not key.endswith(".help")}
        assert expected - {part, "data.tokenizer", "data.rollout_batch_size"} <= named


def test_the_recipes_values_stand_beside_the_options():
    text = shown("--config", "ppo.yaml", "--config", "trainer/ddp.yaml")
    for option in (
        "--model.optimizer=torch.optim.AdamW ",
        "--model.optimizer.lr=2e-06",
        "--model.sampling.max_new_tokens=48 ",
        "--model.score.missing_eos_penalty=1.0 ",
        "--model.kl.horizon=10000 ",
        "--data.max_prompt_length=256 ",
        "--trainer.strategy=ddp ",
        "--data.plain_format.assistant=\\n\\nAssistant: ",
    ):
        assert f"\n  {option}" in text
    assert "a response is cut here if it has not ended" in text
    assert "[cosine|linear|constant]" in text
    assert "data.tokenizer" not in text
    assert "data.rollout_batch_size" not in text


def test_a_later_config_wins(tmp_path):
    (tmp_path / "own.yaml").write_text("trainer: {max_steps: 7}\n")
    text = shown("--config", "sft.yaml", "--config", str(tmp_path / "own.yaml"))
    assert "--trainer.max_steps=7 " in text


def test_without_a_recipe_the_recipes_are_named():
    text = shown()
    assert text.count(", ".join(stage_recipes())) == 2
    assert "--trainer.max_steps " in text


def test_of_a_class_of_somebodys_own_it_says_where_to_look():
    assert "model  my.Module: for its options write --help_all" in shown("--model=my.Module")


def test_the_trainers_options_exist_and_the_runs_too():
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(pl.Trainer, "trainer")
    assert {f"trainer.{name}" for name in TRAINER} <= {action.dest for action in parser_actions(parser)}
    assert all(RUN.values())


def test_a_narrow_terminal_is_kept_to(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown("--config", "sft.yaml").splitlines()
    assert max(len(line) for line in lines if not line.startswith(("  rlhf fit", "  --trainer.callbacks"))) <= 80


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_command_prints_it(capsys, word):
    with pytest.raises(SystemExit) as end:
        main(["validate", "--config", "reward.yaml", word])
    assert not end.value.code
    assert capsys.readouterr().out == shown("--config", "reward.yaml", command="validate")
