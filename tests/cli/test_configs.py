"""Every recipe, alone and under every trainer file, is taken by the command line without running it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml

import rlhf_lightning
from helpers.signatures import parameters
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.recipes import RECIPES, recipe_names
from rlhf_lightning.cli.stages import RLHFCLI

STAGES = [
    name for name in recipe_names() if "class_path" in yaml.safe_load((RECIPES / name).read_text()).get("model", {})
]
TRAINERS = [name for name in recipe_names() if name.startswith("trainer/")]
ENGINES = [name for name in recipe_names() if name.startswith("engine/")]
BORING = "pytorch_lightning.demos.boring_classes"
MODEL, DATA = ({"class_path": f"{BORING}.Boring{what}"} for what in ("Model", "DataModule"))


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as end:
        main(["fit", *args, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf"])


def test_there_is_a_recipe_for_each_stage_and_a_trainer_file_for_each_strategy():
    assert {"sft.yaml", "reward.yaml", "ppo.yaml"} <= set(STAGES)
    assert {"trainer/cpu.yaml", "trainer/ddp.yaml", "trainer/deepspeed_zero2.yaml"} <= set(TRAINERS)


@pytest.fixture(scope="module")
def printed() -> dict[str, dict[str, Any]]:
    """What is printed of each recipe, once it has been."""
    return {}


@pytest.fixture
def parsed(capsys: pytest.CaptureFixture[str], printed: dict[str, dict[str, Any]], recipe: str) -> dict[str, Any]:
    if recipe not in printed:
        printed[recipe] = printed_config(capsys, "--config", recipe)
    return printed[recipe]


@pytest.mark.parametrize("recipe", STAGES)
def test_a_recipe_is_parsed_with_its_values(parsed, recipe):
    given = yaml.safe_load((RECIPES / recipe).read_text())
    for part in ("model", "data"):
        assert parsed[part]["class_path"] == given[part]["class_path"]
        for name, value in given[part]["init_args"].items():
            now = parsed[part]["init_args"][name]
            assert (now | value if isinstance(value, dict) and "class_path" not in value else now) == now
            assert isinstance(value, dict) or now == value
    assert parsed["trainer"]["default_root_dir"] == f"runs/{Path(recipe).with_suffix('').as_posix()}"


class ParserOnly(RLHFCLI):
    """Builds the parser of the command line, which takes long, and stops."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise Built(parser)


class Built(Exception):
    """Carries a parser."""


@pytest.fixture(scope="module")
def fit_parser() -> Any:
    """The parser of `rlhf fit`, built once for all stacks."""
    subclasses = {"subclass_mode_model": True, "subclass_mode_data": True}
    with pytest.raises(Built) as built:
        ParserOnly("fit", None, model_class=pl.LightningModule, datamodule_class=pl.LightningDataModule, **subclasses)
    return built.value.args[0]


@pytest.fixture(scope="module")
def of_the_trainer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trainer's part of each recipe, with a model and data that take no time to be parsed."""
    folder = tmp_path_factory.mktemp("recipes")
    files = {}
    for number, recipe in enumerate(STAGES):
        files[recipe] = folder / f"{number}.yaml"
        parts = {"trainer": yaml.safe_load((RECIPES / recipe).read_text())["trainer"], "model": MODEL, "data": DATA}
        files[recipe].write_text(yaml.safe_dump(parts))
    return files


def assert_stacked(parser: Any, recipe: str, file: Path, trainer: str) -> None:
    given = yaml.safe_load((RECIPES / trainer).read_text())["trainer"]
    parsed = parser.parse_args(["fit", f"--config={file}", f"--config={RECIPES / trainer}"]).fit
    assert parsed.trainer.accelerator == given["accelerator"]
    assert parsed.trainer.default_root_dir == f"runs/{Path(recipe).with_suffix('').as_posix()}"
    strategy, wanted = parsed.trainer.strategy, given["strategy"]
    assert (strategy if isinstance(strategy, str) else strategy.class_path) == (
        wanted if isinstance(wanted, str) else wanted["class_path"]
    )
    if isinstance(wanted, dict):
        for name, value in wanted.get("init_args", {}).items():
            assert strategy.init_args[name] == value


@pytest.mark.long
@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainer_files_stack_on_the_trainer_of_every_recipe(fit_parser, of_the_trainer, trainer):
    for recipe in STAGES:
        assert_stacked(fit_parser, recipe, of_the_trainer[recipe], trainer)


@pytest.mark.parametrize(("recipe", "trainer"), [*zip(STAGES, itertools.cycle(TRAINERS), strict=False)])
def test_a_trainer_file_stacks_on_a_whole_recipe(fit_parser, recipe, trainer):
    """Each of both at least once: a trainer file says nothing of model and data."""
    assert set(yaml.safe_load((RECIPES / trainer).read_text())) == {"trainer"}
    assert_stacked(fit_parser, recipe, RECIPES / recipe, trainer)


@pytest.mark.parametrize("engine", ENGINES)
def test_engine_files_stack_on_the_recipes_that_answer(fit_parser, engine):
    given = yaml.safe_load((RECIPES / engine).read_text())["model"]["init_args"]["engine"]
    for recipe in ("ppo.yaml", "rloo.yaml", "grpo.yaml", "llama3-8b/ppo.yaml"):
        words = [f"--config={RECIPES / name}" for name in (recipe, engine, "trainer/ddp.yaml")]
        found = fit_parser.parse_args(["fit", *words]).fit.model.init_args.engine
        assert found.class_path == given["class_path"]
        assert {name: found.init_args[name] for name in given["init_args"]} == given["init_args"]
    cls = getattr(rlhf_lightning, given["class_path"].rpartition(".")[2])
    assert set(given["init_args"]) == set(parameters(cls)) - {"model", "tokenizer", "batch_size"}


@pytest.mark.parametrize("trainer", [name for name in TRAINERS if "deepspeed" in name])
def test_a_file_of_a_stage_of_zero_says_when_to_take_it_what_it_needs_and_how_it_is_launched(trainer):
    lines = (RECIPES / trainer).read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    said = "# When: ", "# Bytes per trained weight on each of N processes: ", "torchrun --nnodes", "#SBATCH --nodes"
    for word in said:
        assert word in header, f"{trainer} does not say '{word}'"


@pytest.mark.parametrize("recipe", STAGES)
def test_a_printed_config_holds_every_argument_and_is_a_recipe_itself(capsys, parsed, recipe, tmp_path):
    for part in ("model", "data"):
        cls = getattr(rlhf_lightning, parsed[part]["class_path"].rpartition(".")[2])
        linked = {"tokenizer", "rollout_batch_size"} if part == "data" else set()
        assert set(parsed[part]["init_args"]) == set(parameters(cls)) - linked
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(parsed))
    assert printed_config(capsys, "--config", str(own)) == parsed


def test_any_value_is_overridden_on_the_command_line(capsys):
    options = "--model.optimizer.lr 3e-5 --model.sampling.top_k 5 --data.batch_size 4 --trainer.max_steps 3"
    parsed = printed_config(capsys, "--config", "sft.yaml", *options.split())
    assert parsed["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 3e-5
    assert parsed["model"]["init_args"]["optimizer"]["init_args"]["betas"] == [0.9, 0.95]
    assert parsed["model"]["init_args"]["sampling"]["top_k"] == 5
    assert parsed["model"]["init_args"]["sampling"]["max_new_tokens"] == 64
    assert parsed["data"]["init_args"]["batch_size"] == 4
    assert parsed["trainer"]["max_steps"] == 3


def test_nested_settings_of_ppo_are_overridden_one_by_one(capsys):
    options = "--model.kl.coef 0.1 --model.kl.target 6 --model.score.clip null --model.objective.value_clip_range=null"
    options += " --model.objective.gamma 0.9"
    model = printed_config(capsys, "--config", "ppo.yaml", *options.split())["model"]["init_args"]
    assert model["kl"] == {"coef": 0.1, "target": 6.0, "horizon": 10_000, "estimator": "k1"}
    assert {name: value for name, value in model["score"].items() if value is not None} == {
        **{"scaling": True, "missing_eos_penalty": 1.0},
        "overlong_penalty": 1.0,  # which counts beside overlong_buffer alone
    }
    assert model["objective"]["value_clip_range"] is None
    assert model["objective"]["gamma"] == 0.9
    assert model["objective"]["gae_lambda"] == 0.95


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_opens_by_saying_what_it_is_and_how_it_is_run(recipe):
    text = (RECIPES / recipe).read_text()
    header = text[: text.index("\n", text.index("# Hardware"))]
    assert all(line.startswith("#") for line in header.splitlines())
    assert any(f"rlhf {command} --config" in header for command in ("fit", "prepare", "evaluate", "pipeline"))
