"""`rlhf toy`: the quickstart's data and untrained model, to try anything on in minutes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlhf_lightning.cli.places import at_home
from rlhf_lightning.cli.quickstart.toy import (
    build_toy_tokenizer,
    is_free_for_toy_data,
    toy_paths,
    toy_texts,
    write_toy_data,
    write_toy_model,
)
from rlhf_lightning.errors import UserError
from rlhf_lightning.runs.lock import locked
from rlhf_lightning.runs.writable import check_folder
from rlhf_lightning.warning_filters import filter_warnings

MODEL = "model"
"""Folder of the untrained model, beside the data."""


def write_toy(out: Path, seed: int) -> None:
    """Write the data, and the untrained model with its tokenizer.

    Args:
        out: folder for them.
        seed: of data and weights; the same seed writes the same bytes.

    Raises:
        UserError: the folder holds something else, or another process writes to it.
    """
    check_folder("--out", out)
    with locked(out, "--out"):
        if not is_free_for_toy_data(out, out):
            raise UserError(f"'{out}' is not empty and holds no toy data; choose another --out")
        data = write_toy_data(out, seed)
        write_toy_model(out / MODEL, build_toy_tokenizer(toy_texts(data)), seed)


def main(args: Sequence[str]) -> None:
    """Entry point of `rlhf toy`.

    Args:
        args: the words after `toy`.

    Raises:
        UserError: something the user can fix.
    """
    parser = argparse.ArgumentParser(
        prog="rlhf toy",
        description="Write the generated text that the quickstart learns from, rows for all stages, and a random model "
        "of 570,000 weights with its tokenizer, as files that every command takes.",
    )
    parser.add_argument("--out", type=at_home, default=Path("runs/toy"), help="folder for them (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of data and weights (%(default)s)")
    parsed = parser.parse_args(args)
    filter_warnings()
    write_toy(parsed.out, parsed.seed)
    for path in toy_paths(parsed.out):
        print(path)
    print(parsed.out / MODEL)
