"""Whatever people and models write is text on the page."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.app.judgements import Agreement, Judgement, Pair
from rlhf_lightning.app.markup import judged_html, turns, verdict_html
from rlhf_lightning.app.models import Verdict
from rlhf_lightning.chat.written import WrittenPrompt
from rlhf_lightning.evaluation.judge import TokenScore

NASTY = st.text(
    st.sampled_from("<>&\"'/ab=;") | st.characters(exclude_categories=["Cs"]), max_size=20
) | st.sampled_from(["<script>x</script>", "<img src=x onerror=y>", "</span></p></td>", "&lt;b&gt;"])
OURS = {"p", "strong", "span", "class", "style", "title", "table", "thead", "tbody", "tr", "th", "td"}


class Reader(HTMLParser):
    """The names of tags and attributes, and the text."""

    def __init__(self):
        super().__init__()
        self.names, self.text = set(), ""

    def handle_starttag(self, tag, attrs):
        self.names |= {tag, *(name for name, _ in attrs)}

    def handle_data(self, data):
        self.text += data


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


@given(text=NASTY, name=NASTY, comment=NASTY)
def test_markup_is_text(text, name, comment):
    pair = Pair(WrittenPrompt(text), "a", "b", "one", "two", {})
    judged = judged_html(
        [Judgement(pair, name.strip(), "first", True, comment)], [Agreement(name, text, 3, None)], name
    )
    scored = verdict_html(Verdict(0.5, [TokenScore(text, 1.0), TokenScore("", -9.0)]))
    (turn,) = turns([{"role": "user", "content": text}])
    for html, said in ((judged, comment), (scored, text), (turn["content"], text)):
        found = read(html)
        assert found.names <= OURS
        assert said.replace("\r", "") in found.text.replace("\r", "") or "\0" in said


def test_nothing_is_said_without_a_reward():
    assert verdict_html(None) == ""
    assert 'class="tokens"' not in verdict_html(Verdict(1.0, []))


def test_judgements_are_told_by_side_and_the_latest_first():
    pairs = [Pair(WrittenPrompt(f"prompt {n}"), "a", "b", "one", "two", {}) for n in range(3)]
    said = [Judgement(pairs[0], "Ann", "first", True), Judgement(pairs[1], "Ann", "first", False)]
    said.append(Judgement(pairs[2], "Ben", "tie", True))
    html = judged_html(said, [Agreement("Ann", "Ben", 4, 0.5)], " Ann ")
    assert "3 judgements in all, 2 by Ann" in html
    assert "Ann and Ben: Cohen's kappa 0.50 on 4 pairs that both judged" in html
    assert html.index("prompt 1") < html.index("prompt 0")
    assert html.count("<td>left</td>") == html.count("<td>right</td>") == 1
