"""A page in a real browser, headless: it tells of errors on its console and of requests to other machines.

The fixtures `page` and `chromium` are there for every test (`conftest.py` names this file).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Playwright, Route, sync_playwright

COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "there is no Chromium: `apt-get install chromium`, or `playwright install chromium`, lets this test run"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class WatchedPage:
    """A page, and what happened on it.

    Attributes:
        page: Playwright's.
        errors: what its console called an error, and exceptions that nothing caught.
        requests: addresses on other machines that it asked for; they got no answer.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route("**/*", self._stay_here)

    def _stay_here(self, route: Route) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("http", "https") and address.hostname not in ("127.0.0.1", "localhost"):
            self.requests.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    def reload(self) -> None:
        """Load it again. Gradio cuts its own streams off as a page goes and catches nothing: no error of the page."""
        before = len(self.errors)
        self.page.reload()
        self.errors[before:] = [error for error in self.errors[before:] if not error.startswith("AbortError: ")]

    def show(self, width: int, height: int = 900, colors: Literal["light", "dark"] = "light") -> None:
        """Give the window a size in CSS pixels, and the reader a taste."""
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=colors)

    def accessibility_findings(self) -> list[str]:
        """What axe-core finds serious or critical, a line each."""
        violations = Axe().run(self.page).response["violations"]
        return [
            f"{violation['id']}: {violation['help']}: {node['html'][:200]}"
            for violation in violations
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]


def find_chromium(playwright: Playwright) -> str | None:
    """The browser of the system, or else Playwright's own."""
    found = next(filter(None, map(shutil.which, COMMANDS)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).exists() else None)


def launch(playwright: Playwright) -> Browser:
    """Start it; where there is none, the test is skipped with a line that says how to get one."""
    path = find_chromium(playwright)
    if path is None:
        pytest.skip(MISSING)
    return playwright.chromium.launch(executable_path=path, args=OPTIONS)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser for the tests of a file: Playwright's event loop must not outlive them."""
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[WatchedPage]:
    """A page of its own for one test."""
    context = chromium.new_context()
    yield WatchedPage(context.new_page())
    context.close()
