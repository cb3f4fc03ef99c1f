"""A real headless browser that records the errors and requests of a page."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def find_browser() -> str:
    """Return the path of Chromium; if none is installed, skip the test locally and fail it in CI."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    missing = f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start headless Chromium and close it afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(QUIET))
        yield browser
        browser.close()


class Visit:
    """A page in a separate tab.

    Attributes:
        page: Playwright page.
        errors: Console errors and uncaught exceptions of the page.
        requests: Requested URLs, the page's own first.
    """

    def __init__(
        self, browser: Browser, file: Path, width: int = 1200, scheme: Literal["light", "dark"] = "light"
    ) -> None:
        self.page: Any = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda log: self.errors.append(log.text) if log.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.absolute().as_uri())
        self.page.wait_for_load_state("networkidle")
