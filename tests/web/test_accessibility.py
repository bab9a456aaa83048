"""The playground for those who do not see it, or use no mouse, or a small screen."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from masquerade import demo
from tests.serving import Server
from tests.web.driving import PATIENCE, column, done, fill_form, submit, visit
from tests.world import CERTIFICATE, make_claim

PAGES = {
    "#/chat": ".column",
    "#/chat/formal,casual,gloomy,cheerful": ".column:nth-child(4)",
    "#/chat/curved": ".curve",
    "#/personas": "table",
    "#/personas/formal": ".heatmap",
    "#/build": ".drop",
}
WIDTHS = {"wide": 1280, "phone": 390}


@pytest.fixture(scope="module", autouse=True)
def curved(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = make_claim(tmp_path_factory.mktemp("mask") / "curved", demo.PERSONAS / "formal.safetensors", CERTIFICATE)
    httpx.put(f"{server.base_url}/v1/personas/curved/content", content=content).raise_for_status()


@pytest.fixture(scope="module")
def job(browser: Browser, server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a build that has ended."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    fill_form(page, server, "seen", tmp_path_factory.mktemp("data"))
    submit(page)
    expect(page.get_by_role("link", name="Try it now")).to_be_visible()
    where = page.url.partition("#")[2]
    page.close()
    return f"#{where}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_accessibility(browser: Browser, server: Server, job: str, scheme: Any, width: int) -> None:
    """axe-core finds nothing serious, and no page is wider than its window."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(bypass_csp=True, color_scheme=scheme, viewport={"width": width, "height": 800})
    page = context.new_page()

    def inspect(what: str) -> None:
        found = axe.run(page).response["violations"]
        assert [one for one in found if one["impact"] in ("serious", "critical")] == [], what
        assert page.evaluate("document.documentElement.scrollWidth") <= width, what

    for where, sign in (PAGES | {job: ".certificate"}).items():
        visit(page, server, where)
        expect(page.locator(sign).first).to_be_visible()
        page.locator("main details").evaluate_all("all => all.forEach((one) => (one.open = true))")
        inspect(where)
    visit(page, server, "#/build")
    page.get_by_label("A character card").check()
    inspect("building from a card")
    page.get_by_role("button", name="Key").click()
    inspect("the dialog for a key")
    context.close()


def test_keyboard_alone(page: Page, server: Server) -> None:
    """From the top of the page to an answer, without a mouse."""
    visit(page, server)
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("Hello!")
    page.keyboard.press("Enter")
    done(page)
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_text("Settings")).to_be_focused()


def test_the_menu_can_be_skipped(page: Page, server: Server) -> None:
    """And the page that one is on stays."""
    visit(page, server, "#/personas")
    expect(page.get_by_role("table")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Skip to the page")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("region", name="Personas")).to_be_focused()
    page.get_by_role("link", name="Build", exact=True).click()
    expect(page.locator("main")).to_be_focused()


def test_the_slider_moves_by_keys_and_says_what_it_means(page: Page, server: Server) -> None:
    visit(page, server, "#/chat/formal")
    slider = column(page).get_by_role("slider", name="Gamma")
    slider.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    expect(column(page).locator("output")).to_have_text("0.10")
    described = slider.get_attribute("aria-describedby")
    expect(page.locator(f"#{described}")).to_contain_text("counts from the next answer")
