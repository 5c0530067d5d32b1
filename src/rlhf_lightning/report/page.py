"""The report as one HTML file that needs nothing else: no network, no script; readable on paper, a phone, in the dark.

Its content security policy forbids scripts and anything from elsewhere: what a model wrote is shown and never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files

import yaml

from rlhf_lightning import __version__
from rlhf_lightning.evaluation.results import Result
from rlhf_lightning.report import svg
from rlhf_lightning.report.charts import MAIN, Chart, curve_charts, evaluation_charts, score_against_kl
from rlhf_lightning.report.headline import Headline, differing_settings, duration, extent, headlines, verdict
from rlhf_lightning.report.run import Run
from rlhf_lightning.report.samples import Sample

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

MADE_BY = "Made by <code>rlhf report</code>"
"""What stands at the end of each page, by which one is known again."""


def write_page(runs: Sequence[Run]) -> str:
    """The HTML of a report.

    Args:
        runs: one, or several; those of one stage are drawn over one another.
    """
    stages = {stage: [run for run in runs if run.stage == stage] for stage in dict.fromkeys(run.stage for run in runs)}
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    style = files("rlhf_lightning.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = [_stage(f"s{number}", stage, of_stage) for number, (stage, of_stage) in enumerate(stages.items())]
    parts = [
        f'<header><h1>{escape(title)}</h1><p class="soft">Run report, {datetime.now():%Y-%m-%d %H:%M}</p>',
        _navigation(stages),
        "</header><main>",
        _problems(runs),
        *sections,
        _evaluations(runs),
        "</main>",
        f"<footer>{MADE_BY}, rlhf-lightning {__version__}. Pictures lie beside it.</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · run report</title><style>{style}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _navigation(stages: dict[str, list[Run]]) -> str:
    links = [(f"s{number}", stage) for number, stage in enumerate(stages)] if len(stages) > 1 else []
    if any(run.evaluation or run.logs.measured for runs in stages.values() for run in runs):
        links.append(("evaluation", "Evaluation"))
    if not links:
        return ""
    return (
        f'<nav aria-label="Sections">{"".join(f"<a href=#{place}>{escape(name)}</a>" for place, name in links)}</nav>'
    )


def _problems(runs: Sequence[Run]) -> str:
    problems = [problem for run in runs for problem in run.problems]
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f'<div class="verdict problems" role="note"><ul>{items}</ul></div>'


def _stage(name: str, stage: str, runs: Sequence[Run]) -> str:
    """All that is to be said of the runs of one stage."""
    charts = [*filter(None, [score_against_kl(runs)]), *curve_charts(runs)]
    first = [chart for chart in charts if chart.key in MAIN]
    others = [chart for chart in charts if chart.key not in MAIN]
    parts = [f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(stage)}</h2>']
    if len(runs) == 1:
        parts += [_said_of(runs[0]), _tiles(headlines(runs[0]))]
    else:
        parts += [
            _compared(runs),
            *(
                f'<p><b class="c{i % svg.COLORS}">{escape(r.name)}</b>: {escape(v.replace("->", "→"))}</p>'
                for i, r in enumerate(runs)
                if (v := verdict(r))
            ),
        ]
        parts.append(_differences(runs))
    parts += ["<h3>Curves</h3>", _figures(first or others, name)] if charts else []
    if first and others:
        more = _figures(others, name)
        summary = f'<summary><h3 class="inline">{len(others)} more curves</h3></summary>'
        parts.append(f'<details class="more">{summary}{more}</details>')
    parts += [_samples(runs), _places(runs), *map(_settings, runs), "</section>"]
    return "".join(parts)


def _said_of(run: Run) -> str:
    said = verdict(run)
    return f'<p class="soft">{escape(run.name)}: {extent(run)}</p>' + (
        f'<p class="verdict">{escape(said.replace("->", "→"))}</p>' if said else ""
    )


def _tiles(numbers: Sequence[Headline]) -> str:
    tiles = []
    for each in numbers:
        kind = "" if each.better is None else ' class="good"' if each.better else ' class="bad"'
        before = "" if each.before is None else f"<i>{each.show(each.before)} → </i>"
        value = f"{before}<span{kind}>{each.show(each.after)}</span>"
        best = (
            f"best {each.show(each.best)} at {each.best_at:,.0f}"
            if each.best is not None
            else "first → last"
            if before
            else ""
        )
        tiles.append(
            f'<li><span class="name">{each.label}</span><span class="value">{value}</span><small>{best}</small></li>'
        )
    return f'<ul class="tiles">{"".join(tiles)}</ul>' if tiles else ""


def _figures(charts: Sequence[Chart], section: str) -> str:
    return f'<div class="charts">{"".join(_figure(chart, section) for chart in charts)}</div>'


def _figure(chart: Chart, section: str) -> str:
    legend = "".join(
        f'<li><b class="c{line.color % svg.COLORS}"></b>{escape(line.label)}</li>' for line in chart.lines if line.label
    )
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    note = f"<figcaption>{escape(chart.note)}</figcaption>" if chart.note else ""
    return f"<figure><h4>{escape(chart.title)}</h4>{svg.draw(chart, f'{section}-{chart.key}')}{legend}{note}</figure>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """An HTML table whose first column heads its rows.

    Args:
        caption: what it shows.
        head: names of the columns.
        rows: cells as text.
        numbers: the columns that are set to the right.
    """
    right = set(numbers)
    kind = [' class="n"' if place in right else "" for place in range(len(head))]
    top = "".join(f'<th scope="col"{kind[place]}>{escape(name)}</th>' for place, name in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td{kind[place]}>{escape(cell)}</td>" for place, cell in enumerate(cells, 1))
        + "</tr>"
        for first, *cells in rows
    )
    # A table that is wider than its page is scrolled, by keyboard too.
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _compared(runs: Sequence[Run]) -> str:
    numbers = [{each.metric: each for each in headlines(run)} for run in runs]
    labels = {each.metric: each.label for of_run in numbers for each in of_run.values()}
    rows = [
        [
            label,
            *(n.course.replace("->", "→") if (n := of_run.get(metric)) else "-" for of_run in numbers),
        ]
        for metric, label in labels.items()
    ]
    times = [duration(run.logs.seconds) if run.logs.seconds else "-" for run in runs]
    rows += [["Iterations" if runs[0].is_online else "Steps", *(f"{run.steps:,}" for run in runs)], ["Time", *times]]
    return table("First → last", ["", *(run.name for run in runs)], rows, range(1, len(runs) + 1))


def _differences(runs: Sequence[Run]) -> str:
    differing = differing_settings(runs)
    if not differing:
        return '<p class="soft">No setting differs between these runs.</p>'
    rows = [[name, *values] for name, values in differing.items()]
    return table("Settings that differ", ["", *(run.name for run in runs)], rows)


def _samples(runs: Sequence[Run]) -> str:
    """For each prompt its first and last answers side by side, and those in between behind a click."""
    prompts = list(dict.fromkeys(each.prompt for run in runs for answers in run.samples.values() for each in answers))
    if not prompts:
        return ""
    blocks = []
    for prompt in prompts:
        shown, between = [], []
        for run in runs:
            course = [
                (step, each) for step, answers in run.samples.items() for each in answers if each.prompt == prompt
            ]
            name = f"{run.name}, " if len(runs) > 1 else ""
            shown += [_answer(name, run, *course[0])] if len(course) > 1 and run is runs[0] else []
            shown += [_answer(name, run, *course[-1], is_last=True)] if course else []
            between += [_answer(name, run, *moment) for moment in course[1 if run is runs[0] else 0 : -1]]
        more = f'<div class="answers">{"".join(between)}</div>'
        more = f"<details><summary>{len(between)} in between</summary>{more}</details>" if between else ""
        blocks.append(
            f'<article class="sample"><p class="prompt" dir="auto">{escape(prompt.strip())}</p>'
            f'<div class="answers">{"".join(shown)}</div>{more}</article>'
        )
    return f"<h3>Answers to the same prompts</h3>{''.join(blocks)}"


def _answer(name: str, run: Run, step: float, sample: Sample, is_last: bool = False) -> str:
    when = "before training" if step == 0 else f"after {step:,.0f} {'iterations' if run.is_online else 'steps'}"
    text = escape(sample.answer) or '<span class="soft">(empty)</span>'
    kind = "answer last" if is_last else "answer"
    return f'<div class="{kind}"><h5>{escape(name)}{when}</h5><p dir="auto">{text}</p></div>'


def _places(runs: Sequence[Run]) -> str:
    rows = [
        [f"{run.name}: {each.what}" if len(runs) > 1 else each.what, str(each.path), each.note]
        for run in runs
        for each in run.artefacts
    ]
    return f"<h3>Where things lie</h3>{table('Files of the run', ['', 'path', ''], rows)}"


def _settings(run: Run) -> str:
    text = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True)
    if not run.settings:
        return ""
    return (
        f'<details class="card config"><summary>Configuration of {escape(run.name)}</summary>'
        f'<pre tabindex="0">{escape(text)}</pre></details>'
    )


def _evaluations(runs: Sequence[Run]) -> str:
    """Tables and pictures of `evaluation.json`, and what `rlhf validate` and `test` measured."""
    measured = [(run.name, name, f"{value:.4g}") for run in runs for name, value in run.logs.measured.items()]
    evaluations = [run.evaluation for run in runs if run.evaluation]
    results = [row for evaluation in evaluations for row in evaluation.results]
    charts = evaluation_charts(evaluations)
    if not measured and not results and not charts:
        return ""
    parts = ['<section aria-labelledby="evaluation"><h2 id="evaluation">Evaluation</h2>']
    parts += [_figures(charts, "e")] if charts else []
    for metric in dict.fromkeys(row.metric for row in results):
        rows = [
            [row.model, row.group, _value(row), _interval(row), f"{row.count:,}"]
            for row in results
            if row.metric == metric
        ]
        parts.append(table(metric, ["model", "rows", "value", "95% interval", "count"], rows, (2, 3, 4)))
    if measured:
        parts.append(table("Measured by rlhf validate and test", ["run", "metric", "value"], measured, (2,)))
    return "".join([*parts, "</section>"])


def _value(row: Result) -> str:
    """A number; infinity is null in `evaluation.json`, as JSON has none."""
    return "∞" if row.value is None else f"{row.value:.4g}"


def _interval(row: Result) -> str:
    return "" if row.low is None or row.high is None else f"{row.low:.4g} to {row.high:.4g}"
