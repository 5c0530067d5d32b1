"""`samples.md`, as the callback `SampleTexts` writes it, read again: answers to the same prompts over time."""

from __future__ import annotations

import re
from typing import NamedTuple

_HEADING = re.compile(r"^## Step (\d+)$")


class Sample(NamedTuple):
    """A prompt and an answer, as text."""

    prompt: str
    answer: str


def read_samples(markdown: str) -> dict[int, list[Sample]]:
    r"""Samples by the optimizer steps after which they were taken, ascending.

    A run that was resumed from an earlier step has taken back what comes after it.

    Args:
        markdown: a quoted prompt and a fenced answer each, under headings `## Step N`.

    Example:
        >>> read_samples("## Step 3\n\n> Hello\n>\n> you\n\n```text\n# hi\n```\n")
        {3: [Sample(prompt='Hello\n\nyou', answer='# hi')]}
    """
    snapshots: dict[int, list[Sample]] = {}
    step: int | None = None
    prompt: list[str] = []
    answer: list[str] | None = None
    fence = ""
    for line in markdown.split("\n"):
        if answer is not None:  # inside a fence, where nothing but its end counts
            if line == fence:
                if step is not None:
                    snapshots[step].append(Sample("\n".join(prompt), "\n".join(answer)))
                prompt, answer = [], None
            else:
                answer.append(line)
        elif heading := _HEADING.match(line):
            step = int(heading[1])
            snapshots = {earlier: samples for earlier, samples in snapshots.items() if earlier < step}
            snapshots[step] = []
        elif line.startswith(">"):
            prompt.append(line[1:].removeprefix(" "))
        elif line.startswith("```"):
            fence, answer = line.removesuffix("text"), []
    return {step: samples for step, samples in snapshots.items() if samples}
