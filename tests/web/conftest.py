"""A real Chromium, where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("playwright", reason="the browser's driver is not installed")

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.serving import Server, serve
from tests.web.driving import PATIENCE, launch


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The demo, with a store that these tests may change."""
    with serve("--model", "demo") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """It runs an event loop on this thread, beside which there can be no other: it goes before other tests begin."""
    with sync_playwright() as playwright:
        browser = launch(playwright)
        if browser is None:
            pytest.skip("no Chromium is installed")
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page on which nothing may go wrong unnoticed."""
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    assert faults == []
