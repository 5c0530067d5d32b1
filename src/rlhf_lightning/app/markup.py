"""What the page writes as HTML: every text of a person or a model escaped, so that it is shown and never run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from rlhf_lightning.app.judgements import Agreement, Judgement
from rlhf_lightning.app.models import Verdict
from rlhf_lightning.chat.messages import Message
from rlhf_lightning.evaluation.judge import TokenScore

_STRONG = 2.0
"""Scores of this size, in standard deviations of a reward model's own, have the full colour."""
_GOOD, _BAD = "20, 130, 200", "225, 110, 20"
_MOST_SHOWN = 8


def turns(history: Sequence[Message]) -> list[Message]:
    """A conversation as the page's window shows it, where text is HTML.

    Args:
        history: its turns.
    """
    return [{"role": turn["role"], "content": _indented(escape(turn["content"]))} for turn in history]


def _indented(text: str) -> str:
    """Text whose lines keep what they begin with: Gradio takes the common indentation of all but the first away."""
    return re.sub(r"(?m)^[ \t]", lambda blank: f"&#{ord(blank[0])};", text)


def verdict_html(verdict: Verdict | None) -> str:
    """A score, and the tokens in the colours of theirs; nothing without a verdict.

    Args:
        verdict: of an answer.
    """
    if verdict is None:
        return ""
    said = f'<p class="score">score <strong>{verdict.score:+.2f}</strong></p>'
    return said + (tokens_html(verdict.tokens) if verdict.tokens else "")


def tokens_html(tokens: Sequence[TokenScore]) -> str:
    """Tokens on the colours of their scores: blue above 0, orange below; the number shows under the pointer.

    Args:
        tokens: of an answer.
    """
    spans = []
    for token in tokens:
        strength = min(abs(token.score) / _STRONG, 1.0) * 0.55
        colour = f"rgba({_GOOD if token.score >= 0 else _BAD}, {strength:.2f})"
        text = escape(token.text) or "&#8203;"
        spans.append(f'<span style="background: {colour}" title="{token.score:+.2f}">{text}</span>')
    legend = "each token on the colour of the score up to it: orange below 0, blue above"
    return f'<p class="tokens">{"".join(spans)}</p><p class="hint">{legend}</p>'


def judged_html(judgements: Sequence[Judgement], agreement: Sequence[Agreement], annotator: str) -> str:
    """How many judgements there are, how far annotators agree, and the latest of one annotator.

    Args:
        judgements: all of them.
        agreement: of each two annotators.
        annotator: whose latest are shown.
    """
    own = [judgement for judgement in judgements if judgement.annotator == annotator.strip()]
    parts = [f"<p>{len(judgements)} judgements in all, {len(own)} by {escape(annotator.strip()) or 'nobody yet'}</p>"]
    for two in agreement:
        kappa = "not defined" if two.kappa is None else f"{two.kappa:.2f}"
        names = f"{escape(two.first)} and {escape(two.second)}"
        parts.append(f"<p>{names}: Cohen's kappa {kappa} on {two.pairs} pairs that both judged</p>")
    rows = [
        f"<tr><td>{escape(_short(judgement.pair.written.text))}</td><td>{escape(_side(judgement))}</td>"
        f"<td>{escape(judgement.comment)}</td></tr>"
        for judgement in reversed(own[-_MOST_SHOWN:])
    ]
    if rows:
        head = "<tr><th>prompt</th><th>judged</th><th>comment</th></tr>"
        parts.append(f'<table class="judged"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>')
    return "".join(parts)


def _side(judgement: Judgement) -> str:
    if judgement.choice in ("tie", "both bad"):
        return judgement.choice
    return "left" if (judgement.choice == "first") == judgement.first_stood_left else "right"


def _short(text: str, most: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
