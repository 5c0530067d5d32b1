"""Options read from the source are those that jsonargparse finds by importing."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
import pytorch_lightning as pl
from jsonargparse import ArgumentParser

import rlhf_lightning
from rlhf_lightning.cli.errors import find_class
from rlhf_lightning.cli.options import as_word, describe, describe_function, trainer_keys
from rlhf_lightning.cli.spelling import FUNCTIONS
from rlhf_lightning.compat import parser_actions

CLASSES = sorted(name for name in rlhf_lightning.__all__ if name.endswith("Module"))


@pytest.mark.parametrize("name", CLASSES)
def test_every_option_is_found_with_its_words_choices_and_default(name):
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(find_class(name), "model")
    found = {action.dest.removeprefix("model."): action for action in parser_actions(parser)}
    found = {key: action for key, action in found.items() if key != "model" and not key.endswith(".help")}
    described = describe(name)
    assert described is not None
    assert {*described.options, *described.groups} == found.keys()
    for key, option in described.options.items():
        said = found[key]
        assert " ".join((said.help or "").split()) == option.help, key
        if option.default:
            assert option.default == as_word(said.default), key
        elif option.default is None:
            assert said.required, key
    assert described.summary in " ".join((find_class(name).__doc__ or "").split())
    assert all(described.groups.values())


@pytest.mark.parametrize("command", sorted(FUNCTIONS))
def test_every_option_of_a_function_is_found(command):
    module, _, name = f"rlhf_lightning.{FUNCTIONS[command]}".rpartition(".")
    function = getattr(importlib.import_module(module), name)
    skip = {"report"} if command == "evaluate" else set()
    parser = ArgumentParser(add_help=False)
    parser.add_function_arguments(function, skip=skip, as_group=False)
    found = {action.dest: action for action in parser_actions(parser) if not action.dest.endswith(".help")}
    defaults = {key: argument.default for key, argument in inspect.signature(function).parameters.items()}
    tasks = {key: value for key, value in defaults.items() if is_dataclass(value)}  # each a class for jsonargparse
    inside = {f"{key}.{field.name}" for key, value in tasks.items() for field in fields(value)}
    described = describe_function(FUNCTIONS[command])
    assert {*described.options, *described.groups} - skip == found.keys() | inside
    for key, option in described.options.items():
        if key not in skip and "." not in key:
            assert (option.default is None) == bool(found[key].required), key


def test_words_that_an_option_takes_are_known():
    described = describe("rlhf_lightning.SFTModule")
    assert described is not None
    assert described.options["lr_schedule"].choices == ("cosine", "linear", "constant")
    assert described.options["finetune.mode"].choices == ("all", "last_layer", "lora")
    assert described.options["dropout"].choices == ("true", "false")
    assert described.options["warmup_steps"].choices == ()


@pytest.mark.parametrize(
    "path", [None, 3, "", "torch.nn.Linear", "nowhere.Class", "SFTModul", "rlhf_lightning.no.Class"]
)
def test_other_classes_are_not_known(path):
    assert describe(path) is None


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_trainers_keys_are_those_of_its_parser(command):
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(pl.Trainer, "trainer")
    made, called = trainer_keys(command)
    assert {a.dest.partition(".")[2] for a in parser_actions(parser) if a.dest.count(".") == 1} - {"help"} <= made
    assert {"ckpt_path", "weights_only"} <= called


def test_nothing_is_imported_for_it():
    code = (
        "import sys; from rlhf_lightning.cli.options import describe, trainer_keys; describe('PPOModule')\n"
        "from rlhf_lightning.cli.spelling import check_function\n"
        "check_function('sample', ['--policy=a', '--reward=b', '--data=c', '--out=d'])\n"
        "trainer_keys('fit'); assert not {'torch', 'transformers', 'pytorch_lightning'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
