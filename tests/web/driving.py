"""The steps of a user in the playground."""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, Playwright, expect

from masquerade import demo
from tests.serving import Server

PATIENCE = 60_000  # milliseconds, for a machine that does other things too
EXAMPLES = 64
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def launch(playwright: Playwright) -> Browser | None:
    """Chromium or Chrome of the system; None if there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return None
    expect.set_options(timeout=PATIENCE)
    return playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)


def visit(page: Page, server: Server, where: str = "") -> None:
    page.goto(f"{server.base_url}/{where}")


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def column(page: Page, number: int = 0) -> Locator:
    return page.locator(".column").nth(number)


def done(page: Page, number: int = 0) -> Locator:
    """The figures under a column, once its answer has ended."""
    stats = column(page, number).locator(".stats")
    expect(stats).to_contain_text("tokens")
    return stats


def drop_zone(page: Page, label: str) -> Locator:
    """The drop zone with this label."""
    return page.locator(".drop").filter(has_text=label)


def choose(page: Page, label: str, path: Path) -> None:
    drop_zone(page, label).locator("input").set_input_files(path)


def fill_recipe(page: Page, name: str, folder: Path) -> None:
    """A recipe that does not search."""
    choose(page, "Neutral text", shorten(demo.DATA / "facts.jsonl", folder, 20))
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_text("Advanced").click()
    page.get_by_label("Score").select_option("attribution")
    page.get_by_label("Rho").fill("0.003")


def shorten(path: Path, folder: Path, lines: int) -> Path:
    """The first lines of a file, so that a build takes seconds."""
    short = folder / path.name
    short.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]), encoding="utf-8")
    return short


def fill_form(page: Page, server: Server, name: str, folder: Path, examples: int = EXAMPLES) -> None:
    """Everything that a build from examples needs."""
    visit(page, server, "#/build")
    choose(page, "Answers in character", shorten(demo.DATA / "formal.train.jsonl", folder, examples))
    choose(page, "Answers of the opposite", shorten(demo.DATA / "casual.train.jsonl", folder, examples))
    fill_recipe(page, name, folder)
    expect(page.locator(".found p")).to_have_count(3)


def submit(page: Page) -> None:
    page.get_by_role("button", name="Build").click()


def start_build(page: Page, server: Server, name: str, folder: Path) -> None:
    fill_form(page, server, name, folder)
    submit(page)
    expect(page.get_by_role("heading", name="Build", exact=True)).to_be_visible()
