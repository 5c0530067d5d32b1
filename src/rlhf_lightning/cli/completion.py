"""`rlhf completion`: what Tab completes in a shell. The shell asks at every Tab, so nothing slow is imported."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_lightning.cli.main import COMMANDS, STAGE_COMMANDS
from rlhf_lightning.cli.options import describe, trainer_keys
from rlhf_lightning.cli.recipes import named_classes, recipe_names, resolve_recipes
from rlhf_lightning.cli.short_help import RUN
from rlhf_lightning.errors import UserError

_HELP = """\
usage: rlhf completion bash|zsh

Prints what makes Tab complete commands, recipes, and the options and words that a stage takes. For every new shell:

  echo 'eval "$(rlhf completion bash)"' >> ~/.bashrc      (or zsh, in ~/.zshrc)
"""
_BASH = """\
_rlhf() {
    local IFS=$'\\n'
    COMPREPLY=($(rlhf completion for "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
}
complete -o default -F _rlhf rlhf
"""
_ZSH = """\
_rlhf() {
    local -a found
    found=(${(f)"$(rlhf completion for "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)"})
    [[ $PREFIX != -*=* ]] || compset -P '*='
    (( $#found )) && compadd -a found || _files
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
compdef _rlhf rlhf
"""
SHELLS = {"bash": _BASH, "zsh": _ZSH}


def main(words: Sequence[str]) -> None:
    """Print the script for a shell, or, asked by that script, what may follow.

    Args:
        words: those after `rlhf completion`: a shell's name, or `for` and the command line up to the cursor.

    Raises:
        UserError: another word.
    """
    if list(words[:1]) == ["for"] and len(words) == 2:
        print("\n".join(candidates(words[1])))
    elif len(words) == 1 and words[0] in SHELLS:
        print(SHELLS[words[0]], end="")
    elif not words or {"-h", "--help"} & set(words):
        print(_HELP, end="")
    else:
        raise UserError(f"unexpected word '{words[-1]}'; write `rlhf completion bash` or `rlhf completion zsh`")


def candidates(line: str) -> list[str]:
    """What the last word of a command line may become; after `=` only what stands there.

    Args:
        line: up to the cursor.

    Example:
        >>> candidates("rlhf fi"), candidates("rlhf fit --config=sf")
        (['fit'], ['sft.yaml'])
    """
    words = line.split()[1:] + [""] * line[-1:].isspace()
    if len(words) <= 1:
        return _begin(words[-1] if words else "", [*STAGE_COMMANDS, *COMMANDS])
    command, last = words[0], words[-1]
    option, equals, value = last.partition("=") if last.startswith("-") else (words[-2], "=", last)
    if not equals:
        return _begin(last, _options(command, words[1:-1])) if command in STAGE_COMMANDS else _begin(last, ["--help"])
    if option in ("--config", "-c"):
        return _begin(value, recipe_names())
    return _begin(value, _options(command, words[1:-1]).get(option, ())) if command in STAGE_COMMANDS else []


def _begin(word: str, known: Sequence[str] | dict[str, tuple[str, ...]]) -> list[str]:
    return sorted(name for name in known if name.startswith(word))


def _options(command: str, words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Options of a stage and the words that each takes, those of the classes that configs and options name."""
    made, _ = trainer_keys(command)
    names = [*RUN, "model", "data", "help", "help_all", *(f"trainer.{name}" for name in made - {"self"})]
    found: dict[str, tuple[str, ...]] = {f"--{name}": () for name in names}
    try:
        named = named_classes(resolve_recipes(words))
    except UserError:  # a config that is not there yet
        return found
    for part, config in named.items():
        if described := describe(config.get("class_path")):
            found |= {f"--{part}.{name}": option.choices for name, option in described.options.items()}
    return found
