"""The recipes of the papers: pipelines whose steps are taken with their values, and one that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.cli_runs import command, environment, save_model, save_pairs
from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.pipeline.steps import Pipeline, Step, read_pipeline
from rlhf_lightning.cli.recipes import RECIPES

PAPERS = sorted(path.relative_to(RECIPES).as_posix() for path in (RECIPES / "papers").glob("*.yaml"))


def pipeline_of(recipe: str, model: str = "model", data: str = "pairs.jsonl") -> Pipeline:
    values = yaml.safe_load((RECIPES / recipe).read_text())["values"]
    return read_pipeline([recipe], [f"{name}={model if name == 'model' else data}" for name in values], None)


STEPS = [pytest.param(recipe, step, id=f"{Path(recipe).stem}-{step.name}")
         for recipe in PAPERS for step in pipeline_of(recipe).steps if step.run == "fit"]  # fmt: skip


def test_there_is_one_for_each_paper_that_the_guide_names() -> None:
    named = {Path(recipe).stem for recipe in PAPERS}
    assert named == {"stiennon2020", "instructgpt", "bai2022", "llama2", "ppo_max", "n_plus"}
    for recipe in PAPERS:
        pipeline_of(recipe).check()


@pytest.mark.parametrize(("recipe", "step"), STEPS)
def test_a_step_is_taken_with_its_values(recipe: str, step: Step, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf"])
    with pytest.raises(SystemExit) as end:
        main([*pipeline_of(recipe).words(step), "--print_config"])
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    for name, value in step.options.items():
        if isinstance(value, int | float) and not name.endswith("+"):
            part, _, inside = name.partition(".")
            found = config[part] if not inside else config[part].get("init_args", config[part])
            for key in inside.split(".") if inside else ():
                found = found["init_args"][key] if "class_path" in found and key not in found else found[key]
            assert found == value, name


@pytest.mark.launched
@pytest.mark.parametrize("recipe", ["papers/instructgpt.yaml", "papers/llama2.yaml"])  # they have all kinds of step
def test_a_paper_s_recipe_runs(recipe: str, tmp_path: Path) -> None:
    """All its steps, on a model of a few thousand weights, each cut short."""
    save_model(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", 40)
    found = pipeline_of(recipe)
    sizes = {
        "ppo": {"data.max_prompt_length": 48, "model.rollout_batch_size": 4, "model.minibatch_size": 4},
        "reward": {"data.max_length": 64, "data.batch_size": 4},
        "sft": {"data.max_length": 64, "data.batch_size": 4},
    }
    run = {
        "data.validation_split": 0.25,
        "trainer.max_steps": 2,
        "trainer.max_epochs": -1,
        "trainer.val_check_interval": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
        "report": False,
    }
    steps = {}
    for step in found.steps:
        options = dict(step.options)
        if step.run == "fit":
            recipes = Path(step.configs[0]).stem
            options |= {**run, **sizes[recipes]}
            if recipes == "ppo":
                options["model.sampling"] = {**options.get("model.sampling", {}), "max_new_tokens": 4}
                if text := options.get("model.pretraining"):
                    options["model.pretraining"] = {**text, "init_args": {**text["init_args"], "max_length": 64}}
        else:
            options |= {"k": 2, "max_new_tokens": 4, "unfinished": "keep"}
        steps[step.name] = {"run": step.run, "config": list(step.configs), "options": options}
    shortened = {"values": {**found.values, "model": "model"}, "steps": steps}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(shortened, sort_keys=False))
    done = subprocess.run(
        command("pipeline", "--config", "short.yaml"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for step in found.steps:
        left = "export" if step.run == "fit" else "rows.jsonl"
        assert (tmp_path / "runs/pipeline" / step.name / left).exists()
