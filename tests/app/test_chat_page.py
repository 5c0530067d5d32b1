"""The page in a real browser: what a person does there, seen from outside."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import expect

from helpers.browser import WatchedPage
from helpers.chat_page import served, tiny_models
from rlhf_lightning.app.judgements import Judgements
from rlhf_lightning.app.models import Models
from rlhf_lightning.evaluation import Policy

expect.set_options(timeout=20_000)
MARKUP = "<b>bold</b> <script>window.ran = 1</script> <img src=x onerror='window.ran = 2'> ${1 + 1} {{x}} *a* &amp;"
CODE = "def f():\n        if x:\n            pass\n    return 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def judgements(folder):
    return Judgements(folder / "judgements.sqlite")


@pytest.fixture(scope="module")
def models(folder) -> Models:
    return tiny_models(folder)


@pytest.fixture(scope="module")
def address(models, judgements):
    with served(models, judgements) as address:
        yield address


@pytest.fixture(scope="module")
def visitor(chromium, address):
    """Somebody who stays: the page takes seconds to build itself."""
    context = chromium.new_context()
    watched = WatchedPage(context.new_page())
    watched.page.goto(address)
    yield watched
    context.close()


@pytest.fixture
def opened(visitor):
    """The visitor's page, with a conversation that begins anew."""
    tab = visitor.page.get_by_role("tab", name="Chat")
    if tab.get_attribute("aria-selected") != "true":
        tab.click()
    visitor.page.locator("#chat-reset").click()
    expect(visitor.page.locator("#chat-window-0 .message")).to_have_count(0)
    yield visitor.page
    assert not visitor.requests, "no other machine is asked"
    assert not visitor.errors


def send(page, text, tab="chat"):
    page.locator(f"#{tab}-box textarea").fill(text)
    page.keyboard.press("Enter")


def finished(page, tab="chat", side=0):
    expect(page.locator(f"#{tab}-verdict-{side} .score")).to_be_visible()
    return page.locator(f"#{tab}-window-{side} .bot").last.inner_text()


def test_an_answer_streams_is_scored_answered_anew_and_exported(opened):
    seen = []
    opened.expose_function("note", lambda text: seen.append(text))
    opened.evaluate(
        """new MutationObserver(() => {
          const all = document.querySelectorAll("#chat-window-0 .bot .message");
          if (all.length) note(all[all.length - 1].innerText);
        }).observe(document.querySelector("#chat-window-0"), {subtree: true, childList: true, characterData: true})"""
    )
    send(opened, "how do i bake bread?")
    first = finished(opened)
    grown = sorted({text for text in seen if text.strip()}, key=len)
    assert len(grown) > 2, "it came in pieces"
    assert opened.locator("#chat-verdict-0 .tokens span").count() > 2
    opened.locator("#chat-again").click()
    expect(opened.locator("#chat-window-0 .bot").last).not_to_have_text(first)
    finished(opened)
    with opened.expect_download() as saved:
        opened.locator("#chat-export").click()
    (line,) = Path(saved.value.path()).read_text(encoding="utf-8").splitlines()
    assert [turn["role"] for turn in json.loads(line)["messages"]] == ["user", "assistant"]


def test_markup_is_shown_and_not_run(opened):
    said = f"{CODE} {MARKUP}"
    send(opened, said)
    finished(opened)
    assert opened.locator("#chat-window-0 .user .message").inner_text().strip() == said
    assert opened.evaluate("window.ran") is None
    assert not opened.locator("#chat-window-0 .message img").count()


@pytest.fixture
def endless(monkeypatch):
    """Answers do not end by themselves, until they are let."""
    whole = Policy.stream

    def endlessly(self, *args):
        for step in whole(self, *args):
            while step[0].text:
                Event().wait(0.01)
                yield step

    monkeypatch.setattr(Policy, "stream", endlessly)
    return monkeypatch


def being_answered(page, text):
    """Ask something, and wait until there is a beginning of the answer."""
    send(page, text)
    expect(page.locator("#chat-window-0 .bot .message").last).to_have_text(re.compile(r"\S"))


def test_an_answer_is_stopped_and_the_next_one_comes(opened, endless):
    being_answered(opened, "tell me everything")
    opened.locator("#chat-stop").click()
    stopped = finished(opened)
    endless.undo()
    opened.locator("#chat-again").click()
    expect(opened.locator("#chat-window-0 .bot").last).not_to_have_text(stopped)
    assert len(finished(opened)) > len(stopped)


def test_a_conversation_begins_anew_while_an_answer_is_written(opened, endless):
    being_answered(opened, "tell me everything")
    opened.locator("#chat-reset").click()
    expect(opened.locator("#chat-window-0 .message")).to_have_count(0)
    endless.undo()
    send(opened, "how do i bake bread?")
    finished(opened)
    expect(opened.locator("#chat-window-0 .user")).to_have_count(1)


def test_who_writes_on_while_an_answer_is_written_is_answered(opened, endless):
    being_answered(opened, "tell me everything")
    opened.locator("#chat-box textarea").fill("no, how do i bake bread?")
    endless.undo()
    opened.keyboard.press("Enter")
    expect(opened.locator("#chat-window-0 .user")).to_have_count(2)
    expect(opened.locator("#chat-window-0 .bot")).to_have_count(2)
    finished(opened)
    expect(opened.locator("#chat-window-0 .user").last).to_have_text("no, how do i bake bread?")


def test_two_models_answer_side_by_side(opened):
    opened.get_by_role("tab", name="Side by side").click()
    send(opened, "how do i bake bread?", "compare")
    said = [finished(opened, "compare", side) for side in range(2)]
    assert said[0] != said[1]
    opened.locator("#compare-reset").click()
    expect(opened.locator("#compare-window-1 .bot")).to_have_count(0)


def test_a_post_is_summarised_by_two_models(opened):
    opened.get_by_role("tab", name="Summarise").click()
    opened.locator("#summary-post textarea").fill("my dog ate all the bread")
    opened.locator("#summary-go").click()
    for side in ("left", "right"):
        expect(opened.locator(f"#summary-{side} textarea")).to_have_value(re.compile(r"\S"))


def judge(page, name, prompt, key):
    page.locator("#judge-name input, #judge-name textarea").fill(name)
    page.locator("#judge-prompt textarea").fill(prompt)
    page.locator("#judge-ask").click()
    expect(page.locator("#judge-left")).to_be_enabled()
    shown = [page.locator(f"#judge-{side}-answer textarea").input_value() for side in ("left", "right")]
    page.keyboard.press(key)
    expect(page.locator("#judge-left")).to_be_disabled()
    return shown


def test_judgements_by_keyboard_are_there_after_a_reload(address, page, judgements, monkeypatch):
    answered, read = Event(), Judgements.all
    monkeypatch.setattr(Judgements, "all", lambda self: answered.wait(20) and read(self))
    opened = page.page
    opened.goto(address)
    opened.get_by_role("tab", name="Judge").click()
    name, said = opened.locator("#judge-name input, #judge-name textarea"), opened.locator("#judge-said")
    name.fill("Ann")
    answered.set()  # the server greets somebody who has written the name already
    expect(said).to_contain_text("by Ann")
    expect(name).to_have_value("Ann")
    shown = judge(opened, "Ann", "how do i bake bread?", "ArrowLeft")
    (kept,) = judgements.all()
    assert {kept.pair.first, kept.pair.second} == set(shown)
    assert (kept.pair.first if kept.choice == "first" else kept.pair.second) == shown[0]
    judge(opened, "Ann", "how do i repair a chain?", "4")
    page.reload()
    opened.get_by_role("tab", name="Judge").click()
    expect(said).to_contain_text("2 judgements in all, 2 by Ann")
    expect(said.locator("tbody tr").first).to_contain_text("both bad")
    name.press("2")  # a name, not a judgement
    again = judge(opened, "Ben", "how do i bake bread?", "2")
    assert set(again) == set(shown), "all annotators see the same pair"
    expect(said).to_contain_text("Ann and Ben: Cohen's kappa")
    with opened.expect_download() as saved:
        opened.locator("#judge-export").click()
    rows = [json.loads(line) for line in Path(saved.value.path()).read_text(encoding="utf-8").splitlines()]
    assert [row["chosen"] for row in rows] == [shown[0], again[1]]
    assert not page.requests
    assert not page.errors


def test_what_cannot_be_done_is_told(opened):
    send(opened, "  ")
    expect(opened.get_by_text("write something first")).to_be_visible()
    opened.get_by_role("tab", name="Judge").click()
    opened.locator("#judge-ask").click()
    expect(opened.get_by_text("give your name first")).to_be_visible()


def test_nobody_is_shut_out(address, page):
    page.page.goto(address)
    for colors in ("light", "dark"):
        page.show(1280, colors=colors)
        expect(page.page.locator("body.dark")).to_have_count(int(colors == "dark"))
        for tab in ("Chat", "Side by side", "Summarise", "Judge"):
            page.page.get_by_role("tab", name=tab).click()
            page.page.wait_for_function("!document.getAnimations().some(each => each instanceof CSSTransition)")
            assert page.accessibility_findings() == []


def test_sixteen_visitors_at_once(address, models):
    """Each has a turn that waits, and then asks for the answer, as a browser does."""

    def post(place, call, visitor, data):
        body = json.dumps({"data": data, "fn_index": call, "session_hash": f"visitor{visitor}"}).encode()
        request = Request(f"{address}gradio_api/{place}", body, {"Content-Type": "application/json"})
        return json.load(urlopen(request, timeout=60))

    with urlopen(f"{address}config") as answer:
        calls = {call["api_name"]: call["id"] for call in json.load(answer)["dependencies"]}

    def events(visitor):
        with urlopen(f"{address}gradio_api/queue/data?session_hash=visitor{visitor}", timeout=60) as stream:
            for line in stream:
                event = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
                if event.get("msg") == "process_completed":
                    return event
        return None

    def visit(visitor):
        post("queue/join", calls["take"], visitor, [f"visitor {visitor}: hello", None])
        taken = events(visitor)
        post("queue/join", calls["answer"], visitor, [models.choices[0], None, 1.0, 1.0, 0, 16, visitor])
        return taken, events(visitor)

    with ThreadPoolExecutor(16) as visitors:
        for visitor, (taken, answered) in enumerate(visitors.map(visit, range(16))):
            assert taken["success"]
            assert answered["success"]
            asked, said = answered["output"]["data"][0]
            assert asked["content"][0]["text"] == f"visitor {visitor}: hello"
            assert said["role"] == "assistant"
