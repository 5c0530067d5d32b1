"""The report in a real browser: everything is there, nothing runs, nothing is fetched, everybody can read it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from helpers.runs import EVIL, run, write_run
from rlhf_lightning.report import save_report
from rlhf_lightning.report.page import write_page
from rlhf_lightning.report.run import read_run, read_runs


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of one run, of two of a stage, and of a run of another stage beside them."""
    root = tmp_path_factory.mktemp("reports")
    folders = [write_run(root / name, steps, judged=name == "one") for name, steps in (("one", 30), ("other", 20))]
    sft = write_run(root / "sft")
    (sft / "config.yaml").write_text("model:\n  class_path: rlhf_lightning.SFTModule\n")
    return {
        "one": save_report([read_run(folders[0])], root / "one.html"),
        "several": save_report(read_runs([*folders, sft]), root / "several.html"),
    }


@pytest.fixture(params=["one", "several"])
def opened(request, reports, page):
    page.page.goto(reports[request.param].as_uri())
    return page


def test_nothing_is_wrong_and_nothing_is_fetched(opened):
    assert opened.errors == []
    assert opened.requests == []
    assert opened.page.evaluate("performance.getEntriesByType('resource').length") == 0


def test_every_picture_is_there_and_has_a_name(opened):
    shown = opened.page.evaluate(
        "[...document.querySelectorAll('svg')].map(svg => [svg.querySelector('title').textContent, "
        "svg.querySelectorAll('.line, circle').length, svg.getAttribute('role')])"
    )
    titles = [title for title, _, _ in shown]
    assert {"Score", "Score against KL", "KL to the reference", "Entropy", "Memory", "Reliability"} <= {*titles}
    assert all(lines > 0 and role == "img" for _, lines, role in shown)
    ids = opened.page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(ids) == len({*ids})


def test_what_a_model_wrote_is_shown_and_never_run(opened):
    assert "run" not in opened.page.title().split(" · ")[0].split()
    assert opened.page.locator("main script, main img").count() == 0
    last = opened.page.locator(".answer.last p").first.inner_text()
    assert last == f"30 {EVIL}"
    assert opened.page.locator("pre").first.text_content().count("</pre><script>1</script>") == 1


# Each page in both colours, on both widths, and both widths in both colours.
@pytest.mark.parametrize(
    ("opened", "width", "colors"),
    [("one", 390, "light"), ("one", 1280, "dark"), ("several", 390, "dark"), ("several", 1280, "light")],
    indirect=["opened"],
)
def test_everybody_can_read_it(opened, colors, width):
    opened.show(width, colors=colors)
    opened.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert opened.accessibility_findings() == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width


def test_a_value_is_read_where_one_points(reports, page):
    page.page.goto(reports["one"].as_uri())
    reading = page.page.locator("#s0-entropy-t").locator("xpath=..").locator(".reading").nth(5)
    assert not reading.locator("text").is_visible()
    reading.locator("rect").hover()
    assert reading.locator("text").is_visible()
    assert reading.locator("text").text_content() == "iteration 51.75"


def test_on_paper_all_answers_are_shown(reports, page):
    page.page.goto(reports["one"].as_uri())
    assert not page.page.get_by_text(f"10 {EVIL}", exact=True).is_visible()
    page.page.emulate_media(media="print")
    assert page.page.get_by_text(f"10 {EVIL}", exact=True).is_visible()
    assert page.page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") == "rgb(255, 255, 255)"


def test_the_pictures_lie_beside_it(reports):
    names = {path.name for path in reports["one"].with_suffix("").iterdir()}
    assert {"score.png", "score_against_kl.png", "reliability.png"} <= names
    folder = reports["several"].with_suffix("")
    assert {path.name for path in folder.iterdir()} == {"PPO", "SFT", "reliability.png"}
    assert (folder / "PPO/score.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_compared(reports, page):
    page.page.goto(reports["several"].as_uri())
    assert page.page.locator("h2").all_inner_texts() == ["PPO", "SFT", "Evaluation"]
    legend = page.page.locator("#s0-score-t").locator("xpath=../..").locator(".legend li").all_inner_texts()
    assert legend == ["one", "other"]


def test_a_long_run_makes_a_small_page(tmp_path):
    folder = write_run(tmp_path / "long", steps=2000)
    assert save_report([read_run(folder)], tmp_path / "long.html").stat().st_size < 1_000_000


def test_half_of_a_surrogate_pair_does_not_break_it(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=2))
    run.evaluation.results[0] = run.evaluation.results[0]._replace(model="half \ud83d")
    assert "half ?" in save_report([run], tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_broken_file_is_named_and_the_rest_shown(tmp_path, page):
    folder = write_run(tmp_path / "run")
    (events,) = folder.glob("events*")
    events.write_bytes(events.read_bytes()[:-100])
    page.page.goto(save_report([read_run(folder)], tmp_path / "page.html").as_uri())
    assert "ends in the middle of a record" in page.page.locator(".problems").inner_text()
    assert page.page.locator("#s0-score-t").count() == 1


def test_the_name_of_a_metric_is_text():
    found: set[str] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.update(name for name, _ in attrs)

    Reader().feed(write_page([run({'train/a" onclick="b': [1.0, 2.0], "train/<i onload=1>": [1.0, 2.0]})]))
    assert not {name for name in found if name.startswith("on")}


def test_infinity_is_shown(tmp_path):
    folder = write_run(tmp_path / "run", steps=2)
    said = json.loads((folder / "evaluation.json").read_text())
    said["results"][0]["value"] = None
    (folder / "evaluation.json").write_text(json.dumps(said))
    assert "∞" in write_page([read_run(folder)])
