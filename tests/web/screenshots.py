"""The pictures of the documentation: `python -m tests.web.screenshots` writes them to docs/images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from masquerade import smollm2
from tests.serving import Server, serve
from tests.web.driving import PATIENCE, column, done, fill_form, launch, say, submit, visit

IMAGES = Path(__file__).parents[2] / "docs" / "images"
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": WIDE},
    "dark": {"color_scheme": "dark", "viewport": WIDE},
    "phone": {"color_scheme": "light", "viewport": NARROW},
}
QUESTION, NEXT = "How do you feel about Mondays?", "What is your plan for Saturday?"


def settle(page: Page) -> None:
    """The same answers each time; nothing that still moves."""
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("48")
    page.get_by_text("Settings").click()


def chat(page: Page, server: Server) -> None:
    visit(page, server, "#/chat/introvert")
    settle(page)
    say(page, QUESTION)
    done(page)
    say(page, NEXT)
    expect(page.locator(".answer:not([aria-busy])")).to_have_count(2)
    column(page).get_by_text("Certificate").focus()


def compare(page: Page, server: Server) -> None:
    visit(page, server, "#/chat/introvert,extravert,casual,formal")
    settle(page)
    say(page, QUESTION)
    for number in range(4):
        done(page, number)


def persona(page: Page, server: Server) -> None:
    visit(page, server, "#/personas/formal")
    expect(page.locator(".heat")).to_have_count(420)


def build(page: Page, server: Server) -> None:
    visit(page, server, "#/build")
    page.locator(".jobs a").first.click()
    expect(page.locator(".figures")).to_be_visible()


# model -> its scenes; a build of SmolLM2 would take a quarter of an hour
SCENES: dict[str, dict[str, Callable[[Page, Server], None]]] = {
    "smollm2": {"chat": chat, "compare": compare, "persona": persona},
    "demo": {"build": build},
}


def give_past(server: Server) -> None:
    """Two versions of a persona, so that its page compares them."""
    for name in ("casual", "formal"):
        content = (smollm2.PERSONAS / f"{name}.safetensors").read_bytes()
        httpx.put(f"{server.base_url}/v1/personas/formal/content", content=content).raise_for_status()


def build_courteous(browser: Browser, server: Server) -> None:
    """A persona that was just built."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        fill_form(page, server, "courteous", Path(folder), examples=200)
        page.get_by_label("Score").select_option("auto")
        page.get_by_label("Rho").fill("auto")
        submit(page)
        expect(page.get_by_role("link", name="Try it now")).to_be_visible(timeout=600_000)
    page.close()


def photograph(browser: Browser, server: Server, scenes: Mapping[str, Callable[[Page, Server], None]]) -> None:
    """Each scene in each look."""
    for look, options in LOOKS.items():
        context = browser.new_context(**options, reduced_motion="reduce", locale="en-GB")
        for name, scene in scenes.items():
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            scene(page, server)
            page.screenshot(path=IMAGES / f"{name}-{look}.png", animations="disabled")
            page.close()
        context.close()


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        if browser is None:
            raise SystemExit("no Chromium is installed")
        with serve("--model", "smollm2") as server:
            give_past(server)
            photograph(browser, server, SCENES["smollm2"])
        with serve("--model", "demo") as server:
            build_courteous(browser, server)
            photograph(browser, server, SCENES["demo"])
        browser.close()


if __name__ == "__main__":
    main()
