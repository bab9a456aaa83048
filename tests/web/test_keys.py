"""The playground on a server that wants a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from tests.keys.making import make_key
from tests.serving import Server, serve
from tests.web.driving import column, done, say, visit


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str, str]]:
    """A server with keys; an administrator's and a chatter's."""
    store = tmp_path_factory.mktemp("store")
    admin, chat = make_key(store, "admin")[0], make_key(store, "chat")[0]
    with serve("--model", "demo", "--store", str(store)) as server:
        yield server, admin, chat


def enter(page: Page, key: str) -> None:
    page.get_by_role("textbox", name="Key").fill(key)
    page.keyboard.press("Enter")


def test_a_wrong_key_then_the_right_one(page: Page, keyed: tuple[Server, str, str], tmp_path: Path) -> None:
    server, admin, _ = keyed
    visit(page, server)
    dialog = page.get_by_role("dialog", name="The key for this server")
    expect(dialog).to_be_visible()
    enter(page, "mq-wrong")
    expect(dialog.get_by_role("alert")).to_contain_text("Incorrect API key")
    enter(page, admin)
    expect(dialog).to_be_hidden()
    column(page).get_by_label("Persona").select_option("formal")
    say(page, "Hello!")
    done(page)
    column(page).get_by_text("This request as code").click()
    expect(column(page)).to_contain_text("Bearer $MASQUERADE_KEY")
    assert admin not in column(page).inner_text()
    visit(page, server, "#/personas/formal")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the mask").click()
    download.value.save_as(tmp_path / "mask")
    assert download.value.suggested_filename == "formal.safetensors"
    assert (tmp_path / "mask").stat().st_size > 10_000


def test_a_late_refusal_of_the_old_key_asks_for_nothing(page: Page, keyed: tuple[Server, str, str]) -> None:
    server, admin, _ = keyed
    late: list[Route] = []
    page.route("**/v1/personas", lambda route: route.continue_() if late else late.append(route))
    visit(page, server)
    enter(page, admin)
    expect(column(page)).to_be_visible()
    late[0].fulfill(status=401, json={"error": {"message": "Incorrect API key", "code": "invalid_api_key"}})
    say(page, "Hello!")
    done(page)
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_the_key_is_kept_in_the_tab_only(page: Page, keyed: tuple[Server, str, str]) -> None:
    server, admin, _ = keyed
    visit(page, server)
    enter(page, admin)
    expect(column(page)).to_be_visible()
    page.reload()
    expect(column(page)).to_be_visible()
    assert page.evaluate("() => localStorage.length") == 0
    assert page.context.cookies() == []
    with page.context.expect_page() as other:
        page.evaluate("() => void open(location.href, '_blank', 'noopener')")
    expect(other.value.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Key").click()
    enter(page, "")
    expect(page.get_by_role("dialog").get_by_role("alert")).not_to_be_empty()
    assert page.evaluate("() => sessionStorage.length") == 0


def test_a_key_that_opens_little_shows_what_it_opens(page: Page, keyed: tuple[Server, str, str]) -> None:
    server, _, chat = keyed
    visit(page, server, "#/personas/formal")
    enter(page, chat)
    expect(page.locator(".certificate")).to_contain_text("attribution")
    expect(page.locator(".card", has_text="What it prunes").get_by_role("alert")).to_contain_text("scope")
    visit(page, server, "#/build")
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("scope")
