"""YAML that nobody means: one line, at once, in little memory."""

import tracemalloc

import pytest
import yaml

from rlhf_lightning.cli.recipes import RECIPES, find_recipe, read_config, resolve_recipes
from rlhf_lightning.errors import UserError
from rlhf_lightning.yaml_text import load_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 20))
DEEP_ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))
BEYOND = {
    "bomb": (BOMB, "aliases make it more than 100,000 values"),
    "merges": (MERGES, "aliases make it more than 100,000 values"),
    "circle": ("model: &a\n  init_args: *a\n", "an alias stands for something that it is part of"),
    "circle of lists": ("trainer: &a [[*a]]\n", "an alias stands for something that it is part of"),
    "lists": ("a: " + "[" * 20_000, "more than 50 deep"),
    "objects": ("{a: " * 20_000, "more than 50 deep"),
    "dashes": ("- " * 20_000, "more than 50 deep"),
    "keys": ("\n".join("  " * i + "a:" for i in range(300)), "more than 50 deep"),
    "deep aliases": (DEEP_ALIASES, "more than 50 deep"),
    "long": ("a: " + "x" * 2_000_000, "has 2,000,003 characters"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_beyond_bounds_is_one_line_at_once_in_little_memory(tmp_path, name):
    text, said = BEYOND[name]
    path = tmp_path / "given.yaml"
    path.write_text(text)
    tracemalloc.start()
    with pytest.raises(UserError, match=said) as caught:
        read_config(str(path))
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert "given.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["--trainer.callbacks=" + "[" * 20_000], ["--data.columns", "{a: " * 500]])
def test_a_value_on_the_command_line_is_bounded_too(words):
    with pytest.raises(UserError, match=r"^--\S+: values lie more than 50 deep|^\S+.*: values lie"):
        resolve_recipes(words)


@pytest.mark.parametrize("word", ["--a=[b", "--a=file[1].jsonl", "--a=*.jsonl", "--a=x & y", "--a={b: [1, 2]}", "--a"])
def test_other_values_pass(word):
    assert resolve_recipes([word]) == [word]


def test_it_says_what_the_plain_loader_says():
    for path in RECIPES.rglob("*.yaml"):
        assert load_yaml(path.read_text(), "x") == yaml.safe_load(path.read_text())
    for text in ("", "3", "a: &b {c: 1}\nd: *b\ne: {<<: *b, f: 2}"):
        assert load_yaml(text, "x") == yaml.safe_load(text)
    for text in ("a: [", "!!python/object:os.system {}", "a: 2001-99-99", "--- 1\n--- 2"):
        with pytest.raises(yaml.YAMLError):
            load_yaml(text, "x")


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 2500, "a\0b", "/" + "ab/" * 2000])
def test_a_name_that_no_file_can_have_is_not_found(name):
    with pytest.raises(UserError, match=r"neither in the working folder nor a recipe") as caught:
        find_recipe(name)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("trainer: {max_steps: 7}\nmodel: {}\ntrainer: {max_epochs: 1}\n", "line 3: 'trainer' stands there a second"),
        ("trainer:\n  callbacks:\n    - {init_args: {a: 1,\n      a: 2}}\n", "line 4: 'a' stands there a second"),
        ('{"model": {}, "model": {}}', "line 1: 'model' stands there a second"),
    ],
)
def test_a_key_that_stands_twice_in_one_place_is_refused(tmp_path, text, line):
    path = tmp_path / "given.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"given.yaml' {line}"):
        read_config(str(path))


def test_the_same_key_in_two_places_is_none(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text("x: &x {a: 1}\ny: &y {b: 2}\nz: [*x, *x, {<<: *x, <<: *y, a: 3}]\n")
    assert read_config(str(path))["z"] == [{"a": 1}, {"a": 1}, {"a": 3, "b": 2}]
    assert resolve_recipes(["--model.reward={a, a}"]) == ["--model.reward={a, a}"]


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UserError, match=r"config '.*' is a folder; name a file in it"):
        find_recipe(str(tmp_path))
