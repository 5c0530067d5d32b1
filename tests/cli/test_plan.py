"""`rlhf plan`: a stage's recipe is read, and no model but its config."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from rlhf_lightning.cli.main import main
from rlhf_lightning.cli.plan import request_of
from rlhf_lightning.cli.recipes import RECIPES, recipe_names
from rlhf_lightning.compat import say_nothing_of_models
from rlhf_lightning.planning import plan
from rlhf_lightning.planning.plan import GIB
from rlhf_lightning.training.sheets import SHARDED

DOCS = Path(__file__).parents[2] / "docs" / "planning.md"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SHAPES = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "70b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496}
LARGE = [name for name in recipe_names() if name.startswith("llama3-")]


def write_config(folder: Path, size: str) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | SHAPES[size]))
    return str(folder)


@pytest.fixture
def tiny(tmp_path):
    """A model of a few thousand weights without them."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64}
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text(json.dumps(LLAMA | small | {"vocab_size": 512}))
    return str(tmp_path / "lm")


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["rlhf"])


def refused(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main([*words])
    assert left.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_plan_is_printed_for_people(capsys, tiny):
    main(["plan", "--config", "sft.yaml", "--model.model_name_or_path", tiny, "--gpus", "2", "--gpu_memory", "80"])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "SFTModule, 2 GPUs of 80 GiB, DDP, 32-true; GiB on each GPU"
    assert lines[1] == "a step: 4 rows on each, in 1 micro-batch, of 512 tokens"
    assert any(line.startswith("peak: ") and line.endswith("80 GiB: fits") for line in lines)
    assert "What to change" not in said.out


def test_a_plan_is_printed_for_machines(capsys, tiny):
    words = ["plan", "--config=ppo.yaml", "--config", "trainer/ddp.yaml", "--model.model_name_or_path", tiny, "--json"]
    main([*words, "--trainer.precision=bf16-mixed", "--model.value_trunk", "policy", "--gpus=4", "--nodes=2"])
    said = json.loads(capsys.readouterr().out)
    assert (said["stage"], said["strategy"], said["precision"]) == ("PPOModule", "DDP", "bf16-mixed")
    assert (said["gpus"], said["nodes"], said["gpu_memory"], said["fits"]) == (4, 2, None, True)
    assert [role["name"] for role in said["roles"]] == ["policy", "value", "reference", "reward"]
    parts = {part["name"]: part["together"] for part in said["parts"]}
    assert {"answers prompts", "measures answers", "updates the policy", "steps the optimizer"} == parts.keys()
    assert said["peak"] == said["held"] + said["outside"] + max(parts.values())
    assert said["sizes"] == {"step": 8, "micro_batch": 8, "micro_batches": 1, "responses": 16, "answered": 16}


def test_machines_and_precision_come_from_the_recipe_where_they_are_not_given(tiny):
    words = ["--config=sft.yaml", "--model.model_name_or_path", tiny, "--trainer.devices=4", "--trainer.num_nodes=2"]
    request = request_of([*words, "--trainer.accelerator=cpu"])
    assert (request.gpus, request.nodes, request.on_gpu) == (8, 2, False)
    assert request_of(words[:3], gpus=17).nodes == 3


def test_help_names_the_options(capsys):
    main(["plan", "--help"])
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in ("gpus", "nodes", "gpu_memory", "json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus '0' is not a whole number above 0"),
        (["--gpu_memory", "much"], "--gpu_memory 'much' is not a number above 0"),
        (["--gpu", "8"], "unknown option --gpu; did you mean --gpus?"),
        (["--data.batchsize", "8"], "unknown key 'data.batchsize'"),
        (["--model.model_name_or_path", "/no/model"], "model folder '/no/model' does not exist"),
        (["--gpus", "3", "--trainer.strategy", "ddp"], "batch_size (8) must be a multiple of the number of processes"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, tiny, words, message):
    said = refused(capsys, "plan", "--config", "sft.yaml", "--model.model_name_or_path", tiny, *words)
    assert said.startswith(f"error: {message}")


def test_nothing_is_left_of_the_models_in_the_working_folder(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["plan", "--config", "reward.yaml", "--model.model_name_or_path", tiny])
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]
    assert capsys.readouterr().err == ""


def header(recipe: str) -> str:
    return "\n".join(line for line in (RECIPES / recipe).read_text().splitlines() if line.startswith("#"))


def test_there_are_recipes_for_both_sizes():
    stages = {"sft.yaml", "reward.yaml", "ppo.yaml"}
    full = {"sft_full.yaml", "reward_full.yaml", "ppo_full.yaml"}
    wanted = {f"llama3-8b/{name}" for name in stages | full} | {f"llama3-70b/{name}" for name in stages}
    assert wanted == set(LARGE)


@pytest.mark.long
@pytest.mark.parametrize("recipe", LARGE)
def test_a_recipe_of_a_large_model_fits_and_says_how_well(recipe, tmp_path):
    """Their headers name GPUs and memory; neither has been run."""
    size = recipe.removeprefix("llama3-").partition("/")[0]
    said = re.search(r"# Hardware: (one|\d+) GPUs? of 80 GB.*; (\d+) GiB on (it|each), planned", header(recipe))
    assert said, header(recipe)
    gpus = 1 if said[1] == "one" else int(said[1])
    model = write_config(tmp_path / "lm", size)
    with say_nothing_of_models():
        request = request_of(
            [f"--config={RECIPES / recipe}", "--model.model_name_or_path", model], gpus=gpus, gpu_memory=80
        )
        if gpus > 1:
            assert "--config trainer/fsdp2.yaml" in header(recipe)
            request = request.changed("trainer", strategy=SHARDED, precision="bf16-mixed")
        made = plan(request)
    assert made.roles[0].parameters in (
        PARAMETERS[size] + made.roles[0].trained * (gpus == 1),
        PARAMETERS[size]
        - (LLAMA["vocab_size"] - 1) * SHAPES[size]["hidden_size"]
        + made.roles[0].trained * (gpus == 1)
        - SHAPES[size]["hidden_size"] * (gpus == 1),
    )  # with a language model's output layer or a scalar head, and adapters
    assert made.fits
    assert round(made.peak / GIB) == int(said[2])


@pytest.mark.long
def test_the_example_of_the_documentation_is_what_the_command_prints(capsys, tmp_path, monkeypatch):
    text = DOCS.read_text(encoding="utf-8")
    command, printed = re.search(r"```console\n\$ rlhf (.+?)\n\n(.+?)```", text, re.DOTALL).groups()
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "Meta-Llama-3-8B", "8b")
    main(shlex.split(command.replace("\\\n", " ")))
    ours, theirs = ([line.rstrip() for line in said.splitlines()] for said in (capsys.readouterr().out, printed))
    assert ours == theirs
