"""What people write for an option leads to the option that they mean."""

import sys
from typing import Any

import pytest

from rlhf_lightning import UserError
from rlhf_lightning.cli.errors import arguments_of
from rlhf_lightning.cli.recipes import resolve_recipes
from rlhf_lightning.cli.spelling import check_keys, nearest
from rlhf_lightning.cli.stages import RLHFCLI, run_stage
from rlhf_lightning.compat import parser_actions

KNOWN = [
    "config",
    "ckpt_path",
    "seed_everything",
    "overwrite",
    "allow_mismatch",
    *arguments_of("pytorch_lightning.Trainer", "trainer"),
    *arguments_of("SFTModule", "model"),
    *arguments_of("rlhf_lightning.InstructionDataModule", "data"),
]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("model.optimiser.lr", "model.optimizer.lr"),
        ("model.optimizer.learning_rate", "model.optimizer.lr"),
        ("model.init_args.lr", "model.optimizer.lr"),
        ("lr", "model.optimizer.lr"),
        ("model.lora", "model.finetune.mode"),
        ("model.model", "model.model_name_or_path"),
        ("model.path", "model.model_name_or_path"),
        ("data.path", "data.data"),
        ("data.file", "data.data"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("num_train_epochs", "trainer.max_epochs"),
        ("max-steps", "trainer.max_steps"),
        ("trainer.gpus", "trainer.devices"),
        ("batch_size", "data.batch_size"),
        ("model.batch_size", "data.batch_size"),
        ("data.val_split", "data.validation_split"),
        ("data.max_new_tokens", "model.sampling.max_new_tokens"),
        ("model.topk", "model.sampling.top_k"),
        ("resume", "ckpt_path"),
        ("seed", "seed_everything"),
        ("modle.lr_schedule", "model.lr_schedule"),
        ("zzzz", None),
    ],
)
def test_the_nearest_option(written, meant):
    assert nearest(written, KNOWN) == meant


def test_a_class_that_is_not_there_has_no_arguments():
    assert arguments_of("nowhere.Class", "model") == arguments_of("rlhf_lightning.Clas", "model") == []
    assert arguments_of(None, "model") == []


def checked(*options: str, command: str = "fit") -> str:
    """What is said of the options of a stage before anything is imported; empty where they pass."""
    try:
        check_keys(command, resolve_recipes(options))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_option_that_a_stage_takes_passes(command, monkeypatch):
    taken: set[str] = set()

    def note(_: RLHFCLI, parser: Any, args: Any) -> None:
        (subcommands,) = (action for action in parser_actions(parser) if isinstance(action.choices, dict))
        taken.update(option for a in parser_actions(subcommands.choices[command]) for option in a.option_strings)
        sys.exit()

    monkeypatch.setattr(RLHFCLI, "parse_arguments", note)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    with pytest.raises(SystemExit):
        run_stage(command, [])
    assert {"--report", "--overwrite", "--ckpt_path", "--trainer.max_steps"} <= taken
    assert checked(*[word for word in taken if word.startswith("--") and word != "--config"], command=command) == ""


@pytest.mark.parametrize(
    "word",
    [
        "--model.optimizer.lr=3",  # inside another class
        "--trainer.logger.init_args.name=a",
        "--trainer.callbacks+=rlhf_lightning.HFExport",
        "--model.init_args.lr_schedule=linear",
        "--model.sampling.stop_strings+=a",
        "--model.optimizer.help",
        "--ckpt=last",  # the beginning of an option
        "--print_config=skip_null",
        "--data=my.Data",  # whose options are not known
        "-h",
    ],
)
def test_what_may_be_right_passes(word):
    assert checked("--config", "sft.yaml", word) == ""


def test_options_of_a_class_of_somebodys_own_pass():
    assert checked("--config", "sft.yaml", "--model=my.Module", "--model.anything=3") == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: {}\n", "unknown key 'modle'; did you mean 'model'?"),
        (
            "model: {init_args: {sampling: {topk: 1}}}\n",
            "unknown key 'model.sampling.topk': SFTModule has no such argument; ",
        ),
        ("data: {init_args: {batchsize: 1}}\n", "unknown key 'data.batchsize': InstructionDataModule has no such"),
        ("trainer: {max_stepz: 3}\n", "unknown key 'trainer.max_stepz'; did you mean 'trainer.max_steps'?"),
        ("trainer: {logger: {class_path: a.B, init_args: {x: 1}}}\n", ""),
        ("model: {init_args: {optimizer: {class_path: a.B, init_args: {x: 1}}}}\n", ""),
        ("model: {init_args: {micro_batch_size: null}, dict_kwargs: {x: 1}}\n", ""),
        ("model: {init_args: {sampling: null}}\n", "model.sampling has settings of its own, and null is none; set"),
    ],
)
def test_keys_of_a_config_are_looked_at_too(tmp_path, text, said):
    (tmp_path / "own.yaml").write_text(text)
    found = checked("--config", "sft.yaml", "--config", str(tmp_path / "own.yaml"))
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_keys_between_braces_are_looked_at_and_what_is_no_yaml_is_left_to_the_parser():
    recipe = resolve_recipes(["--config", "sft.yaml"])
    for value in ("{top_k: 1}", "{top_k:", "{{user}}", "{}"):
        check_keys("fit", [*recipe, f"--model.sampling={value}"])
    for option in (
        "--data.plain_format.user={name}: ",
        "--data.plain_format={user: '{name}'}",
        "--model.optimizer={a: 1}",
    ):
        check_keys("fit", [*recipe, option])
    with pytest.raises(UserError, match=r"unknown key 'model\.sampling\.topk'.* did you mean 'model\.sampling\.top_k'"):
        check_keys("fit", [*recipe, "--model.sampling={topk: 1}"])
