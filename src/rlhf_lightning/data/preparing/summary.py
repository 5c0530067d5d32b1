"""What a data module says of the prepared tokens it opens: where their rows went, and what to know of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from rlhf_lightning.data.encode import NOTES
from rlhf_lightning.data.preparing.counts import say_counts
from rlhf_lightning.data.preparing.lengths import say_cuts
from rlhf_lightning.data.rows import KINDS


def said_of_rows(sources: Mapping[str, Mapping[str, Any]]) -> Counter[str]:
    """Counts of the rows of all sources, those of `validation_data` and `test_data` with that word in front.

    Args:
        sources: from a manifest.
    """
    counts: Counter[str] = Counter()
    written = tuple(f"{kind} " for kind in KINDS)  # examples, of which a data module reads one kind
    for role, said in sources.items():
        word = "" if role == "data" else f"{role.removesuffix('_data')} "
        rows = {name: count for name, count in said["counts"].items() if not name.startswith(written)}
        counts.update({f"{word}{name}": count for name, count in rows.items()})
    return counts


def say_prepared(reader: str, manifest: Mapping[str, Any], counts: Mapping[str, int]) -> None:
    """Log the counts and what is noted of rows, and warn of sources of which many responses are cut.

    Args:
        reader: whose lines they are.
        manifest: of a prepared folder.
        counts: of its rows, and the examples of each part.
    """
    names = [f"{role.replace('_', ' ')}: {said['name']}" for role, said in manifest["sources"].items()]
    where = "; " + ", ".join(names) if len(names) > 1 else ""
    notes = [f"{counts[name]:,} {meaning}" for name, meaning in NOTES.items() if counts.get(name)]
    for line in (f"{say_counts(counts)}{where}", *notes):
        rank_zero_info(f"{reader}: {line}")
    for line in say_cuts(manifest):
        rank_zero_warn(line)
