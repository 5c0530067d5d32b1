"""What a prepared folder holds: where every row went, how long the texts are, and what of them is taught.

`report_on` measures a folder, `print_report` shows it, `save_report` writes `report.json`, `report.txt` and
`lengths.png` beside its tables.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.collate import EncodedExample, taught_tokens
from rlhf_lightning.data.encode import NOTES
from rlhf_lightning.data.preparing.counts import Counts
from rlhf_lightning.data.preparing.examples import DUPLICATE, FURTHER
from rlhf_lightning.data.preparing.length_plot import draw_lengths
from rlhf_lightning.data.preparing.lengths import PERCENTILES, say_cuts, statistics
from rlhf_lightning.data.preparing.manifest import PARTS, Part, file_name, write_json
from rlhf_lightning.data.preparing.prepared import PreparedFolder, TokenTable
from rlhf_lightning.data.rows import Need

Tables = dict[tuple[Need, Part], TokenTable]
ANSWERS: dict[Need, tuple[str, ...]] = {
    "finetune": ("response",),
    "preference": ("chosen", "rejected"),
    "prompts": (),
    "rated": ("response",),
}
"""The columns of each kind of example that hold responses."""

_NOTES = {
    DUPLICATE: "prompts that came before and are not written again",
    FURTHER: "pairs beyond the first of their ranking",
    **NOTES,
}
_CUTS = {"prompt": "prompts cut", "response": "responses cut, their end of turn with it"}
REPORT_FILES = ("report.json", "report.txt", "lengths.png")
_BAD_ROWS_SHOWN = 5
_WIDTH = 110  # of the saved text, in characters
_TAUGHT = "bold green"
_SHOWN = 700  # characters of a prompt on a terminal


def report_on(folder: PreparedFolder, tokenizer: PreTrainedTokenizerBase, num_examples: int = 10) -> dict[str, Any]:
    """Measure a prepared folder.

    Args:
        folder: opened.
        tokenizer: the one it was made with.
        num_examples: how many examples to write out, shared by the kinds that hold responses.

    Returns:
        What `report.json` holds: `tokenizer`, `names` of the data, `rows` (`rows in`, `kept`, `dropped` and `cut` by
        reason, `other stages`, and how many `responses` were tokenised), `written` (rows by kind and part), `sources`,
        `lengths` in tokens, `whole_lengths` before cutting, with the `max_length` that `keeps_95` percent of the
        responses whole, `cuts` (what is to be said of them), `chosen_against_rejected` (shares of the pairs),
        `bad_rows` and `examples`.
    """
    manifest = folder.manifest
    sources = manifest["sources"]
    filled = filled_tables(folder)
    rows = {name: part["rows"] for name, part in manifest["parts"].items()}
    return {
        "tokenizer": manifest["chat"]["tokenizer"],
        "names": {role: source["name"] for role, source in manifest["sources"].items()},
        "rows": {role: _account(source) for role, source in manifest["sources"].items()},
        "written": {need: {part: rows[file_name(need, part)] for part in PARTS} for need in manifest["kinds"]},
        "sources": _sources(manifest["sources"]["data"], filled),
        "whole_lengths": {role: said["whole_lengths"] for role, said in sources.items() if "whole_lengths" in said},
        "cuts": say_cuts(manifest),
        "lengths": {f"{need} {part}": _lengths(table) for (need, part), table in filled.items()},
        "chosen_against_rejected": {
            part: _compare(table) for (need, part), table in filled.items() if need == "preference"
        },
        "bad_rows": {role: source["bad_rows"] for role, source in manifest["sources"].items()},
        "examples": _examples(filled, tokenizer, num_examples),
    }


def save_report(folder: PreparedFolder, report: dict[str, Any]) -> None:
    """Write the report beside the tables."""
    write_json(folder.path / "report.json", report)
    text = io.StringIO()
    print_report(Console(file=text, width=_WIDTH, color_system=None), report)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    (folder.path / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_lengths(folder.path / "lengths.png", filled_tables(folder), report["rows"]["data"])


# Measuring


def filled_tables(folder: PreparedFolder) -> Tables:
    """The tables of a folder that hold rows, by kind and part."""
    tables: Tables = {(need, part): folder.part(need, part) for need in folder.manifest["kinds"] for part in PARTS}
    return {place: table for place, table in tables.items() if len(table)}


def _account(source: dict[str, Any]) -> dict[str, Any]:
    """Where the rows of one source went; they add up."""
    counts = Counts.read(source["counts"])
    counts.check(None)
    return {
        "rows in": counts.rows,
        "dropped": _largest_first(counts.dropped),
        "other stages": counts.other_stages,
        "kept": counts.kept,
        "responses": source.get("whole_lengths", {}).get("responses", 0),
        "cut": _largest_first(counts.cut),
        "lacking": _largest_first(counts.lacking),
        "unused": _largest_first(counts.unused),
        "notes": {name: counts.others[name] for name in _NOTES if counts.others[name]},
    }


def _largest_first(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.most_common() if count}


def _sources(data: dict[str, Any], tables: Tables) -> list[dict[str, Any]]:
    """Name, weight and training rows of each source of the blend."""
    names, weights = data["source_names"], data["source_weights"]
    rows = {
        need: np.bincount(table.sources, minlength=len(names))
        for (need, part), table in tables.items()
        if part == "train"
    }
    return [
        {"name": name, "weight": weight, "train": {need: int(counts[i]) for need, counts in rows.items()}}
        for i, (name, weight) in enumerate(zip(names, weights, strict=True))
    ]


def _lengths(table: TokenTable) -> dict[str, dict[str, float]]:
    """Statistics of prompt, responses, and both together (with the longer response of a pair), in tokens."""
    columns = {name: table.lengths(name) for name in ("prompt", *ANSWERS[table.need])}
    if len(columns) > 1:
        columns["together"] = table.total_lengths
    return {name: statistics(lengths) for name, lengths in columns.items()}


def _compare(table: TokenTable) -> dict[str, float]:
    """Shares of the pairs whose chosen response is longer, as long, or shorter than the rejected, in tokens."""
    difference = table.lengths("chosen") - table.lengths("rejected")
    signs = {"longer": difference > 0, "as long": difference == 0, "shorter": difference < 0}
    return {name: float(found.mean()) for name, found in signs.items()}


# Examples


def _examples(tables: Tables, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Any]]:
    """Training examples, evenly spread over each table, as texts cut where teaching begins and ends."""
    shown = [table for (need, part), table in tables.items() if part == "train" and ANSWERS[need]]
    shown = shown or [table for (_, part), table in tables.items() if part == "train"]
    examples = []
    for i, table in enumerate(shown):
        wanted = min(len(table), (count + i) // len(shown))
        for row in np.unique(np.linspace(0, len(table) - 1, wanted).round().astype(int)):
            examples.append(_example(table, int(row), tokenizer))
    return examples


def _example(table: TokenTable, row: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    prompt, *columns = table.ids(row)
    turns = columns[0] if table.need == "finetune" else ()
    texts: dict[str, list[dict[str, Any]]] = {}
    for name, response in zip(ANSWERS[table.need], columns[-len(ANSWERS[table.need]) :], strict=True):
        example = EncodedExample(np.concatenate([prompt, response]), len(prompt), row, turns)
        pieces = _pieces(example.ids, taught_tokens(example, "turns"), tokenizer)
        texts[name] = pieces[-1:] if texts else pieces  # both responses of a pair follow the same prompt
    if not texts:
        texts["prompt"] = _pieces(prompt, np.zeros(len(prompt), dtype=bool), tokenizer)
    return {"kind": table.need, "row": int(table.row_ids[row]), "source": int(table.sources[row]), "texts": texts}


def _pieces(ids: Any, taught: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """A sequence as texts that are taught or not, in turn, special tokens included."""
    borders = [0, *(np.flatnonzero(np.diff(taught)) + 1).tolist(), len(ids)]
    # Differences of decoded beginnings: some tokenizers drop the space of a text that begins with one.
    texts = [
        tokenizer.decode(ids[:border].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for border in borders
    ]
    pieces = [
        {"text": after[len(before) :], "taught": bool(taught[start])}
        for start, (before, after) in zip(borders, pairwise(texts), strict=False)
    ]
    return [piece for piece in pieces if piece["text"]]


# Showing


def print_report(console: Console, report: dict[str, Any], examples: bool = True) -> None:
    """Print a report; where there are no colours, what is taught stands between ⟦ and ⟧.

    Args:
        console: where to; long prompts are shortened if it is a terminal.
        report: from `report_on`.
        examples: print the examples too.
    """
    for name, value in {"tokenizer": report["tokenizer"], **report["names"]}.items():
        console.print(Text(f"{name.replace('_', ' ')}: {value}"), soft_wrap=True)
    console.print()
    if examples:  # first, so that the summary is what stands on the screen at the end
        _print_examples(console, report["examples"])
        console.print()
    console.print(_rows_table(report["rows"]))
    _print_bad_rows(console, report["bad_rows"])
    console.print(_written_table(report["written"]))
    for role, account in report["rows"].items():
        for name, count in account["notes"].items():
            of = "" if role == "data" else f" of {role}"
            console.print(f" {_NOTES[name]}{of}: {count:,}\n", highlight=False)
        for what, count in account["unused"].items():
            of = "" if role == "data" else f" of {role}"
            console.print(Text(f" {what}{of} is not used: {count:,} rows hold something there"), soft_wrap=True)
    if len(report["sources"]) > 1:
        console.print(_sources_table(report["sources"]))
    if report["chosen_against_rejected"]:
        console.print(_compared_table(report["chosen_against_rejected"]))
    console.print(_lengths_table("Lengths in tokens", report["lengths"]))
    if whole := {role.replace("_", " "): said["columns"] for role, said in report["whole_lengths"].items()}:
        console.print(_lengths_table("Lengths in tokens before cutting", whole))
    for role, said in report["whole_lengths"].items():
        if enough := said["keeps_95"]:
            of = "" if role == "data" else f" of {role.replace('_', ' ')}"
            console.print(f" max_length {enough} keeps 95% of the responses{of} whole", highlight=False)
    for line in report["cuts"]:
        console.print(Text(f" {line}", style="yellow"), soft_wrap=True)


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def _rows_table(rows: dict[str, dict[str, Any]]) -> Table:
    columns = [column for role in rows for column in (role.replace("_", " "), "share")]
    table = _table("Rows", ["", *columns])

    def add(name: str, numbers: Sequence[int], style: str = "", of: str = "rows in") -> None:
        if not any(numbers):
            return
        totals = [account[of] or account["rows in"] for account in rows.values()]
        cells = [c for n, total in zip(numbers, totals, strict=True) for c in (f"{n:,}", f"{n / total:.1%}")]
        table.add_row(Text(name), *cells, style=style)

    add("rows in", [account["rows in"] for account in rows.values()], "bold")
    for reason in dict.fromkeys(reason for account in rows.values() for reason in account["dropped"]):
        add(f"- {reason}", [account["dropped"].get(reason, 0) for account in rows.values()])
    add("- of other stages", [account["other stages"] for account in rows.values()])
    in_part = any(account["unused"] for account in rows.values())
    add(
        "= kept, not all of what they hold" if in_part else "= kept",
        [account["kept"] for account in rows.values()],
        "bold",
    )
    for reason in dict.fromkeys(reason for account in rows.values() for reason in account["lacking"]):
        add(
            f"  but not for all kinds: {reason}",
            [account["lacking"].get(reason, 0) for account in rows.values()],
            "dim",
        )
    for what in dict.fromkeys(what for account in rows.values() for what in account["cut"]):
        numbers = [account["cut"].get(what, 0) for account in rows.values()]
        add(_CUTS.get(what, f"{what} cut"), numbers, "dim", "responses" if what == "response" else "rows in")
    return table


def _print_bad_rows(console: Console, bad_rows: dict[str, dict[str, Any]]) -> None:
    for bad in bad_rows.values():
        for place, reason in bad["first"][:_BAD_ROWS_SHOWN]:
            console.print(Text(f" bad row {place}: {reason}", style="yellow"), soft_wrap=True)
        if bad["count"] > _BAD_ROWS_SHOWN:
            more = f" … {bad['count']:,} bad rows in all; the first {len(bad['first']):,} are in manifest.json"
            console.print(more, highlight=False)


def _written_table(written: dict[str, dict[str, int]]) -> Table:
    table = _table("Written", ["", *PARTS])
    for need, parts in written.items():
        table.add_row(need, *(f"{count:,}" for count in parts.values()))
    return table


def _sources_table(sources: list[dict[str, Any]]) -> Table:
    kinds = list(sources[0]["train"])
    table = _table("Training rows by source", ["", "weight", *kinds])
    for source in sources:
        table.add_row(Text(source["name"]), f"{source['weight']:g}", *(f"{source['train'][k]:,}" for k in kinds))
    return table


def _lengths_table(title: str, lengths: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = _table(title, ["", "", "mean", *(f"{p}%" for p in PERCENTILES), "longest"], left=2)
    for place, columns in lengths.items():
        for i, (name, found) in enumerate(columns.items()):
            mean, *others = found.values()
            cells = [f"{mean:,.1f}", *(f"{value:,.0f}" for value in others)]
            table.add_row("" if i else place, name, *cells, end_section=i == len(columns) - 1)
    return table


def _compared_table(compared: dict[str, dict[str, float]]) -> Table:
    table = _table("Chosen against rejected", ["", *next(iter(compared.values()))])
    for part, shares in compared.items():
        table.add_row(part, *(f"{share:.1%}" for share in shares.values()))
    return table


def _print_examples(console: Console, examples: list[dict[str, Any]]) -> None:
    coloured = console.color_system is not None
    marks = "in green" if coloured else "between ⟦ and ⟧"
    console.print(f"[bold]Examples[/bold], what is taught {marks}")
    for example in examples:
        for name, pieces in example["texts"].items():
            console.print(Text(f"\n── {example['kind']} row {example['row']:,}, {name}", style="dim"))
            console.print(render(pieces, coloured, _SHOWN if console.is_terminal else None), soft_wrap=True)


def render(pieces: list[dict[str, Any]], coloured: bool, most: int | None = None) -> Text:
    """One example as text, with what is taught marked.

    Args:
        pieces: `text` and `taught`, in order.
        coloured: mark by colour instead of by ⟦ and ⟧.
        most: shorten what is not taught to this many characters; None keeps all.

    Example:
        >>> render([{"text": "Human: hi", "taught": False}, {"text": " Hello!", "taught": True}], coloured=False).plain
        'Human: hi⟦ Hello!⟧'
    """
    text = Text()
    for piece in pieces:
        shown = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in piece["text"])
        if piece["taught"]:
            text.append(shown if coloured else f"⟦{shown}⟧", style=_TAUGHT if coloured else "")
            continue
        if most is not None and len(shown) > most:
            left_out = f"{len(shown) - most:,} characters"
            shown = f"{shown[: most // 2]} … {left_out} … {shown[-(most // 2) :]}"
        text.append(shown)
    return text
