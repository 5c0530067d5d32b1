"""YAML of whatever origin, read within bounds of size, depth and aliases. Nothing here is slow to import."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import yaml

from rlhf_lightning.errors import UserError

_LONGEST = 1_000_000  # characters; a recipe has some thousands
_DEEPEST = 50  # values inside each other
_MOST = 100_000  # values, each as often as aliases repeat it
_SUSPECT = re.compile(r"[\[{&*]|.{1000}", re.DOTALL)


class _TwiceError(UserError):
    """A key stands twice in one place."""


class _Loader(yaml.SafeLoader):
    """Stops where values lie too deep in each other, long before Python does."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise UserError(f"values lie more than {_DEEPEST} deep in each other")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def load_yaml(text: str, name: str, keys_once: bool = False) -> Any:
    """What YAML says: plain values, never objects.

    Args:
        text: YAML or JSON.
        name: what error messages call it.
        keys_once: refuse a key that stands twice in one place, of which YAML forgets the first.

    Raises:
        UserError: it is too large or too deep, its aliases lead in a circle or to more values than anybody writes, or
            it has a key twice.
        yaml.YAMLError: it is no YAML.
    """
    if len(text) > _LONGEST:
        raise UserError(f"{name} has {len(text):,} characters; no more than {_LONGEST:,} are read")
    depth = accumulate(1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(depth, default=0) > 10 * _DEEPEST:  # which PyYAML takes minutes for; brackets in texts need not be in pairs
        raise UserError(f"{name}: values lie more than {_DEEPEST} deep in each other; write it in a simpler way")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        if keys_once and (twice := _key_twice(node)):
            raise _TwiceError(
                f"{name} line {twice.start_mark.line + 1}: '{twice.value}' stands there a second time, and what the "
                "first one holds would be lost; write both as one"
            )
        return loader.construct_document(node)
    except _TwiceError:
        raise
    except UserError as error:
        raise UserError(f"{name}: {error}; write it in a simpler way") from error
    except (ValueError, OverflowError) as error:  # such as a date in month 13
        raise yaml.YAMLError(str(error)) from error


def _key_twice(node: yaml.Node) -> yaml.ScalarNode | None:
    """The second one of two keys that are the same, but for `<<`, which may merge several mappings."""
    waiting, seen = [node], {id(node)}
    while waiting:
        node = waiting.pop()
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        found: set[tuple[str, str]] = set()
        for key in keys:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (name := (key.tag, key.value)) in found:
                    return key
                found.add(name)
        inner = [value for _, value in node.value] if keys else node.value if isinstance(node.value, list) else []
        waiting += [each for each in inner if id(each) not in seen]
        seen.update(map(id, inner))
    return None


def check_values(words: Iterable[str]) -> None:
    """Refuse a value on the command line that is YAML beyond these bounds; what is no YAML passes.

    Args:
        words: of the command line.

    Raises:
        UserError: names the option.
    """
    for word in words:
        option, equals, value = word.partition("=")
        if not _SUSPECT.search(value if equals else word):
            continue
        try:
            load_yaml(value if equals else word, option[:100])
        except yaml.YAMLError:
            continue


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for with its aliases written out, and how deep they lie in each other."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise UserError("an alias stands for something that it is part of")
        return found
    known[id(node)] = None
    children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else []
    children = [*node.value] if isinstance(node, yaml.SequenceNode) else children
    sizes = [_measure(child, known) for child in children]
    size, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    if size > _MOST:
        raise UserError(f"aliases make it more than {_MOST:,} values")
    if depth > _DEEPEST:
        raise UserError(f"values lie more than {_DEEPEST} deep in each other")
    known[id(node)] = size, depth
    return size, depth
