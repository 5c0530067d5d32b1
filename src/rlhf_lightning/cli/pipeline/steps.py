"""What a pipeline's file says: values, steps, and where each leaves what it makes."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_lightning.cli.places import at_home, refuse_empty
from rlhf_lightning.cli.recipes import find_recipe, read_config, resolve_recipes
from rlhf_lightning.cli.spelling import check_function, check_keys, check_words
from rlhf_lightning.errors import UserError

RESULTS = {"fit": "export", "toy": "", "prepare": "", "sample": "rows.jsonl", "evaluate": "evaluation.json"}
"""The commands that a step may run, and what each leaves in its folder for those after it."""
_OUT = {"fit": "trainer.default_root_dir", "toy": "out", "prepare": "out", "sample": "out", "evaluate": "out"}
_NAMED = re.compile(r"\{(\w+)\}")
_GROUPS = {"model", "data", "trainer"}
_WRITTEN = {"out", "default_root_dir", "dirpath", "save_dir", "cache_dir"}
"""Settings that name what a step writes; below `trainer`, where callbacks and loggers stand, `path` does, too."""
_KEYS = {"out", "values", "steps"}
_STEP_KEYS = {"run", "config", "options"}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step, and of its folder.
        run: one of `RESULTS`.
        configs: files for `--config`, in order.
        options: of the command, names with dots to values; `{name}` stands for a value, or for what a step has left.
    """

    name: str
    run: str = "fit"
    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> set[str]:
        """Names that its options ask for."""
        return {name for value in self.options.values() for text in _texts_in(value) for name in _NAMED.findall(text)}


@dataclass(frozen=True)
class Pipeline:
    """All steps.

    Attributes:
        out: folder of all of them.
        values: what the file and the command line give names to.
        steps: in the order in which they run.
    """

    out: Path
    values: Mapping[str, Any]
    steps: tuple[Step, ...]

    def folder(self, step: Step) -> Path:
        """Where a step works."""
        return self.out / step.name

    def result(self, step: Step) -> Path:
        """What a step leaves for those after it."""
        return self.folder(step) / RESULTS[step.run]

    @property
    def named(self) -> dict[str, Any]:
        """What each name stands for."""
        return {**self.values, **{step.name: str(self.result(step)) for step in self.steps}}

    def inputs(self, step: Step) -> Iterator[str]:
        """All texts among the settings of a step, some of which are paths, but for places that it writes to.

        Args:
            step: one of the pipeline's; what its options say replaces what its config files do.
        """
        settings: dict[str, Any] = {}
        for config in step.configs:
            settings |= _settings(read_config(config))
        for key, value in _settings(dict(step.options)).items():
            settings = {name: was for name, was in settings.items() if not f"{name}.".startswith(f"{key}.")}
            settings[key] = _filled(value, self.named)
        for key, value in settings.items():
            written = _WRITTEN | {"path"} if key.startswith("trainer.") else _WRITTEN
            if key.rpartition(".")[2] not in written:
                yield from _texts_in(value, written)

    def words(self, step: Step) -> list[str]:
        """The command of a step, after `rlhf`.

        Args:
            step: one of the pipeline's.
        """
        options = {key: _filled(value, self.named) for key, value in step.options.items()} | self._own(step)
        given = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
        return [step.run, *(f"--config={config}" for config in step.configs), *given]

    def _own(self, step: Step) -> dict[str, str]:
        """Options that are the pipeline's to set."""
        place = self.result(step) if step.run == "sample" else self.folder(step)
        return {_OUT[step.run]: str(place)} | ({"ckpt_path": "auto"} if step.run == "fit" else {})

    def shown(self, step: Step) -> str:
        """The command of a step as somebody would type it."""
        return "rlhf " + shlex.join(self.words(step))

    def check(self) -> None:
        """Refuse what the last step would refuse after hours of the first, as far as it can be told without loading.

        Raises:
            UserError: names the step.
        """
        before: set[str] = set(self.values)
        for step in self.steps:
            if unknown := sorted(step.inputs - before):
                raise UserError(f"step '{step.name}': {_unknown(unknown[0], before, [s.name for s in self.steps])}")
            self._check_own(step)
            try:
                words = resolve_recipes(self.words(step)[1:])
                refuse_empty(step.run, words)
                if step.run == "fit":
                    check_words(words)
                    check_keys("fit", words)
                else:
                    check_function(step.run, words)
            except UserError as error:
                raise UserError(f"step '{step.name}': {error}") from error
            before.add(step.name)

    def _check_own(self, step: Step) -> None:
        """Refuse what the pipeline's own settings would replace, but for the folder that every recipe names."""
        for name, value in self._own(step).items():
            for key in step.options.keys() - _GROUPS:
                if name.startswith(key):  # Lightning takes the beginning of an option for all of it
                    what = "it" if key == name else f"'{name}'"
                    raise UserError(
                        f"step '{step.name}': leave out '{key}', the pipeline sets {what} itself: to '{value}'"
                    )
        if "config" in step.options:
            raise UserError(f"step '{step.name}': write config beside options, not below")
        for config in step.configs:
            if step.run == "fit" and read_config(config).get("ckpt_path") not in (None, "auto"):
                raise UserError(f"step '{step.name}': config '{config}' says ckpt_path, which the pipeline sets itself")


def read_pipeline(configs: Sequence[str], given: Sequence[str], out: Path | None) -> Pipeline:
    """What the files and the command line say.

    Args:
        configs: `--config=FILE` words as `resolve_recipes` gave them, or paths; later ones win, value by value and step
            by step.
        given: `NAME=VALUE` of `--set`.
        out: folder of all steps; None for that of the file.

    Raises:
        UserError: says what is wrong, and where.
    """
    if not configs:
        raise UserError("--config names no file; pass a pipeline, such as pipeline.yaml")
    merged: dict[str, Any] = {"values": {}, "steps": {}}
    for config in configs:
        said = read_config(find_recipe(config))
        _refuse_unknown(said, _KEYS, f"pipeline '{config}'")
        for key in ("values", "steps"):
            if not isinstance(said.get(key) or {}, dict):
                raise UserError(f"'{config}': {key} must hold 'name: ...' lines")
            merged[key] |= said.get(key) or {}
        merged["out"] = said.get("out", merged.get("out"))
        if not isinstance(merged["out"], str | None):
            raise UserError(f"'{config}': out must be the name of a folder, not {merged['out']!r}")
    assigned = dict(map(_assignment, given))
    for name in assigned:
        if name not in merged["values"]:
            close = difflib.get_close_matches(name, merged["values"], 1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(merged['values']) or 'none'}"
            raise UserError(f"--set {name}: the pipeline has no value of that name; {hint}")
    values = merged["values"] | assigned
    if unset := [name for name, value in values.items() if value is None]:
        raise UserError(f"the value '{unset[0]}' is not set: pass --set {unset[0]}=...")
    steps = tuple(_step(name, said) for name, said in merged["steps"].items())
    if not steps:
        raise UserError(f"'{configs[-1]}' has no steps; a pipeline holds 'steps:' with a name for each")
    for step in steps:
        if step.name in values:
            raise UserError(f"'{step.name}' is the name of a value and of a step; rename one of them")
    if merged["out"] == "":
        raise UserError("out is empty; name a folder, or leave it out")
    return Pipeline(at_home(str(out or merged["out"] or "runs/pipeline")), values, steps)


def _assignment(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--set takes NAME=VALUE, such as data=pairs.jsonl, not '{word}'")
    return name, value


def _step(name: str, said: Any) -> Step:
    if said is None:
        raise UserError(
            f"step '{name}' is null: write 'config: ...' and 'options: ...' below it, or leave its name out"
        )
    if not isinstance(said, dict):
        raise UserError(f"step '{name}' must hold 'config: ...' and 'options: ...' lines")
    if not str(name).isidentifier():
        raise UserError(f"step '{name}': use letters, digits and _ in its name, which is also that of its folder")
    _refuse_unknown(said, _STEP_KEYS, f"step '{name}'")
    run, configs, options = said.get("run") or "fit", said.get("config") or [], said.get("options") or {}
    if run not in RESULTS:
        raise UserError(f"step '{name}': run '{run}' is unknown; use {', '.join(RESULTS)}")
    if not isinstance(options, dict):
        raise UserError(f"step '{name}': options must hold 'name: value' lines")
    configs = [configs] if isinstance(configs, str) else configs
    if not isinstance(configs, list) or not all(isinstance(config, str) for config in configs):
        raise UserError(f"step '{name}': config must be the name of a file, or a list of such names")
    return Step(str(name), run, tuple(find_recipe(config) for config in configs), dict(_flat(options)))


def _flat(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options by their names; those of the model, the data and the trainer may stand below these words."""
    for key, value in options.items():
        if key in _GROUPS and isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield str(key), value


def _settings(said: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names, as they are written on the command line."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        key = f"{prefix}{name}".replace(".init_args.", ".")
        if isinstance(value, dict) and value:
            found |= _settings(value, prefix if name == "init_args" else f"{key}.")
        else:
            found[key] = value
    return found


def _texts_in(value: Any, but: Collection[str] = ()) -> Iterator[str]:
    """The texts in a value, however deep, but for those of these names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in [value[name] for name in value.keys() - but] if isinstance(value, dict) else value:
            yield from _texts_in(each, but)


def _filled(value: Any, named: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        whole = _NAMED.fullmatch(value)
        if whole:
            return named[whole[1]]  # also a list, or a number
        return _NAMED.sub(lambda match: str(named[match[1]]), value)
    if isinstance(value, dict):
        return {key: _filled(each, named) for key, each in value.items()}
    return [_filled(each, named) for each in value] if isinstance(value, list) else value


def _unknown(name: str, before: set[str], steps: Sequence[str]) -> str:
    if name in steps:
        return f"'{{{name}}}' is what a later step makes, or this one; put that step before it"
    close = difflib.get_close_matches(name, sorted(before), 1)
    hint = f"did you mean '{{{close[0]}}}'?" if close else "give it under 'values:', or by --set"
    return f"'{{{name}}}' is neither a value nor an earlier step; {hint}"


def _refuse_unknown(said: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := [key for key in said if key not in known]:
        raise UserError(f"{where}: '{unknown[0]}' is unknown; it may hold {', '.join(sorted(known))}")
