"""How long prompts and responses are before anything is cut, and which `max_length` would leave them whole."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_lightning.data.preparing.counts import Counts

PERCENTILES = (5, 25, 50, 75, 95, 99)
MANY_CUT = 0.1
"""Share of responses cut above which that is warned of."""


class WholeLengths:
    """Collects the lengths of rows before they are cut, in tokens.

    Args:
        max_prompt_length: what a prompt is cut to whatever `max_length` is.
    """

    def __init__(self, max_prompt_length: int | None) -> None:
        self._max_prompt_length = max_prompt_length
        self._prompts, self._responses, self._together = array("q"), array("q"), array("q")

    def add(self, prompt: int, responses: Sequence[int]) -> None:
        """Add one row."""
        room = prompt if self._max_prompt_length is None else min(prompt, self._max_prompt_length)
        self._prompts.append(prompt)
        self._responses.extend(responses)
        self._together.extend(room + response for response in responses)

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps.

        Returns:
            `responses`, how many; `keeps_95`, the `max_length` that leaves 95% of them whole, 0 where there are none;
            and in `columns` statistics of `prompt`, `response`, and `together`, a response with its prompt.
        """
        columns = {"prompt": self._prompts, "response": self._responses, "together": self._together}
        enough = int(np.percentile(self._together, 95, method="inverted_cdf")) if self._together else 0
        found = {name: statistics(np.asarray(lengths)) for name, lengths in columns.items() if lengths}
        return {"responses": len(self._responses), "keeps_95": enough, "columns": found}


def statistics(lengths: np.ndarray) -> dict[str, float]:
    """Mean, percentiles and maximum of some lengths, `[N]`."""
    percentiles = np.percentile(lengths, PERCENTILES)
    named = {f"p{p}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)}
    return {"mean": float(lengths.mean()), **named, "max": int(lengths.max())}


def say_cuts(manifest: Mapping[str, Any]) -> list[str]:
    """A line for each source of which more than 10% of the responses are cut.

    Args:
        manifest: of a prepared folder; one that was made before such lengths were kept says nothing.
    """
    lines = []
    for source in manifest["sources"].values():
        cut = Counts.read(source["counts"]).cut["response"]
        whole = source.get("whole_lengths", {"responses": 0})
        if cut > MANY_CUT * whole["responses"] > 0:
            limit = manifest["arguments"]["limits"]["max_length"]
            lines.append(
                f"{cut / whole['responses']:.0%} of the responses of {source['name']} are cut at max_length {limit} "
                f"and lose their end; max_length {whole['keeps_95']} keeps 95% whole"
            )
    return lines
