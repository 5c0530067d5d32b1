"""The options of a class or function, read from its source: nothing is imported, so help and typos come at once.

What is read is what jsonargparse finds by importing: arguments, of a class those of `__init__`, those that `**kwargs`
hands to the class below, the fields of a dataclass argument after a dot, and the docstring's words on each.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from rlhf_lightning import _HOME_OF as HOMES

_PACKAGE = "rlhf_lightning"


class Option(NamedTuple):
    """One option.

    Attributes:
        default: as the source has it; "" where it is not a plain value, None where one must be given.
        help: the docstring's words.
        choices: the words that it takes, if they are few.
        kinds: names of the types that it takes, `None` among them; "" for one that its source does not tell.
    """

    default: str | None
    help: str
    choices: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("",)


class Described(NamedTuple):
    """A class, or a function.

    Attributes:
        summary: first line of the docstring.
        options: by their names, those of dataclass arguments after a dot.
        groups: these arguments, and the docstring's words on each.
    """

    summary: str
    options: dict[str, Option]
    groups: dict[str, str]


class Place(NamedTuple):
    """Where a name is defined.

    Attributes:
        module: dotted name.
        node: a class, a function, or what a name stands for.
    """

    module: str
    node: ast.ClassDef | ast.FunctionDef | ast.expr


def describe(class_path: object) -> Described | None:
    """The options of one of this package's classes; None for any other, which must be imported to be known.

    Args:
        class_path: `package.module.Class`, or `Class`.
    """
    if not isinstance(class_path, str):
        return None
    module, _, name = class_path.rpartition(".")
    if module in ("", _PACKAGE):
        if name not in HOMES:
            return None
        module = f"{_PACKAGE}.{HOMES[name]}"
    place = _find(module, name) if module.startswith(f"{_PACKAGE}.") else None
    return _described(place) if place and isinstance(place.node, ast.ClassDef) else None


def describe_function(path: str) -> Described:
    """The options of one of this package's functions that a command is made of.

    Args:
        path: `module.function`, below the package.
    """
    module, _, name = f"{_PACKAGE}.{path}".rpartition(".")
    tree = _tree(module)
    functions = [n for n in (tree.body if tree else []) if isinstance(n, ast.FunctionDef) and n.name == name]
    return _described(Place(module, functions[0]))


def trainer_keys(command: str) -> tuple[set[str], set[str]]:
    """What Lightning's Trainer is made with, and what its method takes.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
    """
    place = _find("pytorch_lightning.trainer.trainer", "Trainer")
    if place is None or not isinstance(place.node, ast.ClassDef):
        return set(), set()
    methods = {n.name: n.args for n in place.node.body if isinstance(n, ast.FunctionDef)}
    made, called = ({a.arg for a in (*m.args, *m.kwonlyargs)} for m in (methods["__init__"], methods[command]))
    return made, called


@cache
def _tree(module: str) -> ast.Module | None:
    """The source of a module; a package's is its `__init__`."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)  # imports nothing but for what is below a package
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
    return None


@cache
def _find(module: str, name: str) -> Place | None:
    """Where a name that a module knows is defined, whatever it is imported through."""
    tree = _tree(module)
    for node in ast.walk(tree) if tree else []:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Place(module, node)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(node.module, alias.name)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return Place(module, node.value)
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == name
            and node.value
        ):
            return Place(module, node.value)
    return None


@cache
def _described(place: Place) -> Described:
    found: dict[str, Option] = {}
    groups: dict[str, str] = {}
    for name, (annotation, default, text, module) in _arguments(place).items():
        inner = _dataclass(module, annotation)
        if inner is None:
            kinds = tuple(_kinds(module, annotation))
            found[name] = Option(_value(module, default), text, _choices(module, annotation), kinds)
            continue
        groups[name] = text
        if isinstance(default, ast.Name) and (constant := _find(module, default.id)):
            module, default = constant.module, constant.node if isinstance(constant.node, ast.expr) else None
        given = {k.arg: _value(module, k.value) for k in default.keywords} if isinstance(default, ast.Call) else {}
        for field, option in _described(inner).options.items():
            found[f"{name}.{field}"] = option._replace(default=given.get(field, option.default))
    docstring = ast.get_docstring(place.node) if isinstance(place.node, ast.ClassDef | ast.FunctionDef) else None
    return Described((docstring or "").partition("\n")[0], found, groups)


_Argument = tuple["ast.expr | None", "ast.expr | None", str, str]


def _arguments(place: Place) -> dict[str, _Argument]:
    """Annotation, default (None where there is none), words and module of each argument of a class or function."""
    node = place.node
    if isinstance(node, ast.FunctionDef):
        words = _words(ast.get_docstring(node) or "")
        return {n: (*pair, words.get(n, ""), place.module) for n, pair in _signature(node.args, 0).items()}
    if not isinstance(node, ast.ClassDef):
        return {}
    words = _words(ast.get_docstring(node) or "")
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    bases = [b for base in node.bases if isinstance(base, ast.Name) and (b := _find(place.module, base.id))]
    below: dict[str, _Argument] = {}
    for base in reversed(bases):
        below |= _arguments(base)
    own: dict[str, tuple[ast.expr | None, ast.expr | None]] = {}
    if init is not None:
        own = _signature(init.args, 1)
        below = _handed_on(init, below) if init.args.kwarg else {}
    elif any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
        own = {ast.unparse(n.target): (n.annotation, n.value) for n in fields}
    found: dict[str, _Argument] = {n: (*pair, words.get(n, ""), place.module) for n, pair in own.items()}
    for name, (annotation, default, text, module) in below.items():
        found.setdefault(name, (annotation, default, words.get(name, text), module))
    return found


def _signature(args: ast.arguments, skip: int) -> dict[str, tuple[ast.expr | None, ast.expr | None]]:
    """Annotation and default of each argument after the first ones."""
    taken, defaults = args.args[skip:], args.defaults
    own: dict[str, tuple[ast.expr | None, ast.expr | None]] = {a.arg: (a.annotation, None) for a in taken}
    own |= {a.arg: (a.annotation, d) for a, d in zip(taken[len(taken) - len(defaults) :], defaults, strict=True)}
    named = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return own | {a.arg: (a.annotation, d) for a, d in named}


def _handed_on(init: ast.FunctionDef, below: dict[str, _Argument]) -> dict[str, _Argument]:
    """What `super().__init__(a, b=b, **kwargs)` leaves open of the arguments of the class below."""
    for node in ast.walk(init):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            given = {keyword.arg for keyword in node.keywords}
            count = sum(not isinstance(argument, ast.Starred) for argument in node.args)
            return {name: told for i, (name, told) in enumerate(below.items()) if i >= count and name not in given}
    return {}


def _words(docstring: str) -> dict[str, str]:
    """What a Google-style docstring says of each argument."""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _dataclass(module: str, annotation: ast.expr | None) -> Place | None:
    if not isinstance(annotation, ast.Name):
        return None
    place = _find(module, annotation.id)
    if not (place and place.module.startswith(_PACKAGE) and isinstance(place.node, ast.ClassDef)):
        return None
    return place if any("dataclass" in ast.unparse(d) for d in place.node.decorator_list) else None


def _choices(module: str, annotation: ast.expr | None) -> tuple[str, ...]:
    if isinstance(annotation, ast.Name) and (place := _find(module, annotation.id)):
        annotation = place.node if isinstance(place.node, ast.expr) else None
    if annotation is not None and (words := literal_words(ast.unparse(annotation))):
        return words
    if isinstance(annotation, ast.Name) and annotation.id == "bool":
        return ("true", "false")
    return ()


def literal_words(kind: str) -> tuple[str, ...]:
    """The words of a `Literal`; none of anything else.

    Args:
        kind: a type as its source has it.

    Example:
        >>> literal_words("Literal['cut', 'drop']"), literal_words("int")
        (('cut', 'drop'), ())
    """
    if not kind.startswith("Literal["):
        return ()
    values = ast.literal_eval(kind.removeprefix("Literal[")[:-1])
    return tuple(map(str, values if isinstance(values, tuple) else (values,)))


def _kinds(module: str, annotation: ast.expr | None) -> Iterator[str]:
    if isinstance(annotation, ast.BinOp):
        yield from _kinds(module, annotation.left)
        yield from _kinds(module, annotation.right)
    elif isinstance(annotation, ast.Name) and annotation.id not in ("int", "float", "bool", "str"):
        place = _find(module, annotation.id)
        if place and isinstance(place.node, ast.expr):  # a name for a type
            yield from _kinds(place.module, place.node)
        else:
            yield annotation.id if place else ""
    elif annotation is not None:
        text = ast.unparse(annotation)
        yield "" if re.search(r"\b(Any|Optional|Union|object)\b", text) else text


def _value(module: str, default: ast.expr | None) -> str | None:
    if default is None:
        return None
    try:
        return as_word(ast.literal_eval(default))
    except ValueError:
        return ""


def as_word(value: object) -> str:
    """A plain value as it is written on the command line.

    Example:
        >>> as_word(None), as_word(True), as_word(0.5), as_word("cosine")
        ('null', 'true', '0.5', 'cosine')
    """
    word = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return word.replace("\n", "\\n")
