"""The page that other tests look at tells of what it must not do, and a machine without a browser says so."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from helpers import browser


def test_a_page_tells_of_errors_and_of_requests_to_other_machines(page, tmp_path):
    (tmp_path / "there.png").write_bytes(b"")
    (tmp_path / "page.html").write_text(
        "<img src='http://example.org/away.png' alt=''><img src='there.png' alt=''>"
        "<script>console.error('one'); throw Error('two')</script>"
    )
    page.page.goto((tmp_path / "page.html").as_uri())
    assert page.requests == ["http://example.org/away.png"]
    errors = [error.split(":")[0] for error in page.errors]
    assert [error for error in errors if error != "Failed to load resource"] == ["one", "two"]
    # the request is answered beside the script, before or after it
    assert errors.count("Failed to load resource") == 1


def test_what_a_reader_cannot_see_is_a_finding(page):
    page.page.set_content("<html lang='en'><title>t</title><main><h1 style='color: #eee'>pale</h1></main>")
    assert [finding.split(":")[0] for finding in page.accessibility_findings()] == ["color-contrast"]
    page.page.set_content("<html lang='en'><title>t</title><main><h1>black</h1></main>")
    assert not page.accessibility_findings()


def test_the_browser_of_the_system_comes_first_then_that_of_playwright(monkeypatch, tmp_path):
    own = tmp_path / "chrome"
    playwright = SimpleNamespace(chromium=SimpleNamespace(executable_path=str(own)))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert browser.find_chromium(playwright) is None
    own.touch()
    assert browser.find_chromium(playwright) == str(own)
    system = tmp_path / "chromium-browser"
    system.touch(mode=0o755)
    assert browser.find_chromium(playwright) == str(system)


def test_without_a_browser_one_line_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(browser, "find_chromium", lambda playwright: None)
    with pytest.raises(pytest.skip.Exception, match="`apt-get install chromium`"):
        browser.launch(SimpleNamespace())
