"""Commands that are one function each: its signature is the options, its docstring the help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import auto_cli

from rlhf_lightning.cli.stages import OneLineParser, user_error
from rlhf_lightning.warning_filters import filter_warnings


def run_function(
    function: Callable[..., Any], command: str, options: Sequence[str], usage: str, positional: bool = True
) -> Any:
    """Call a function with the options of its command.

    Args:
        function: with annotations and Google-style docstring.
        command: after `rlhf`.
        options: the words after the command, recipes resolved.
        usage: of what follows the command.
        positional: the arguments that it demands are words without a name.

    Raises:
        UserError: something the user can fix.
    """
    filter_warnings()
    try:
        return auto_cli(
            function,
            args=list(options),
            as_positional=positional,
            parser_class=OneLineParser,
            config_help="A YAML file of options; later ones win.",
            prog=f"rlhf {command}",
            usage=f"rlhf {command} {usage}",
            description="",
        )
    except ValueError as error:
        if mendable := user_error(error):
            raise mendable from error
        raise
