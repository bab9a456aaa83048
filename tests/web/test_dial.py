"""The slider of gamma and the curve below it, with a certificate that is made by hand."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from masquerade import demo
from tests.serving import Server
from tests.web.driving import column, say, visit
from tests.world import CERTIFICATE, CURVE, make_claim


@pytest.fixture(scope="module", autouse=True)
def curved(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A persona with a curve that is easy to read, and one without."""
    folder = tmp_path_factory.mktemp("mask")
    straight = {name: value for name, value in CERTIFICATE.items() if name != "curve"}
    for name, like, certificate in (("curved", "formal", CERTIFICATE), ("straight", "casual", straight)):
        content = make_claim(folder / name, demo.PERSONAS / f"{like}.safetensors", certificate)
        httpx.put(f"{server.base_url}/v1/personas/{name}/content", content=content).raise_for_status()


def curve(page: Page) -> Locator:
    return column(page).locator(".curve")


def turn(page: Page, gamma: str) -> None:
    column(page).get_by_label("Gamma").fill(gamma)


@pytest.mark.parametrize(
    ("gamma", "words"),
    [
        ("0", "at gamma 0: shift 0.83, neutral text 10.7 % less likely, 90 % of facts kept"),
        ("0.5", "at gamma 0.5: shift 0.40, neutral text 2.0 % less likely, 100 % of facts kept"),
        ("0.4", "at gamma 0.4: shift 0.49, neutral text 3.1 % less likely, 98 % of facts kept"),
        ("0.9", "at gamma 0.9: shift 0.05, neutral text 0.1 % less likely, 100 % of facts kept"),
        ("1", "at gamma 1: shift 0.00, neutral text as likely as without, 100 % of facts kept"),
    ],
)
def test_a_gamma_is_put_into_words(page: Page, server: Server, gamma: str, words: str) -> None:
    """At the measured points, between them, and at the base; also for those who only hear the slider."""
    visit(page, server, "#/chat/curved")
    expect(curve(page)).to_contain_text("claimed, not measured here")
    turn(page, gamma)
    expect(curve(page).locator("figcaption")).to_have_text(words)
    expect(column(page).get_by_label("Gamma")).to_have_attribute("aria-valuetext", words)


def test_the_mark_follows_the_slider(page: Page, server: Server) -> None:
    visit(page, server, "#/chat/curved")
    expect(curve(page).get_by_role("img")).to_be_visible()
    where = []
    for gamma in ("0", "0.5", "1"):
        turn(page, gamma)
        thumb = column(page).get_by_label("Gamma").bounding_box()
        marks = [curve(page).locator(name).bounding_box() for name in (".now", ".dot.shift", ".dot.cost")]
        assert thumb
        assert all(marks)
        centres = [mark["x"] + mark["width"] / 2 for mark in marks if mark]
        assert max(centres) - min(centres) < 1
        where.append((centres[0] - thumb["x"]) / thumb["width"])
    assert where == sorted(where)
    assert where[1] == pytest.approx(0.5, abs=0.02)
    assert where[0] == pytest.approx(1 - where[2], abs=0.02)


def test_the_drawing_has_a_text(page: Page, server: Server) -> None:
    visit(page, server, "#/chat/curved")
    text = curve(page).get_by_role("img").get_attribute("aria-label")
    assert text is not None
    assert text.startswith("Effect and cost: at 0 shift 0.83, neutral text 10.7 % less likely, 90 % of facts kept; ")
    assert text.count(";") == len(CURVE)  # and the base
    expect(curve(page)).to_contain_text("shift, up to 0.83 nats a token")
    expect(curve(page)).to_contain_text("cost on neutral text, up to 10.7 %")


@pytest.mark.parametrize("points", [None, [], [{"gamma": 0.5, "own_ratio": 1.0, "facts_kept": None}]])
def test_a_curve_of_nothing_is_not_drawn(page: Page, server: Server, points: list[dict[str, Any]] | None) -> None:
    serve_certificate(page, server, {} if points is None else {"curve": points})
    with page.expect_response("**/v1/personas/formal"):
        visit(page, server, "#/chat/formal")
    turn(page, "0.5")
    expect(column(page).locator("output")).to_have_text("0.50")
    expect(curve(page)).to_be_hidden()


def test_a_persona_without_a_curve_has_its_slider(page: Page, server: Server) -> None:
    visit(page, server, "#/chat/curved")
    expect(curve(page)).to_be_visible()
    column(page).get_by_label("Persona").select_option("straight")
    expect(curve(page)).to_be_hidden()
    expect(column(page).get_by_label("Gamma")).not_to_have_attribute("aria-valuetext", re.compile(".*"))
    turn(page, "0.5")
    say(page, "Hello!")
    expect(column(page).locator(".answer")).not_to_be_empty()


def serve_certificate(page: Page, server: Server, certificate: dict[str, Any]) -> None:
    persona = httpx.get(f"{server.base_url}/v1/personas/formal").json()
    persona |= {"certificate": certificate, "certificate_source": "measured"}
    page.route("**/v1/personas/formal", lambda route: route.fulfill(json=persona))


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([{"gamma": 0.5, "neutral_ratio": 0.9}], "at gamma 0.5: neutral text 11.1 % likelier"),
        ([{"gamma": 0.25}, {"gamma": 0.75, "margin_shift_median": -0.25}], "at gamma 0.5: not measured"),
        ([{"gamma": 0.75, "margin_shift_median": 0.2}], "at gamma 0.5: not measured"),
        ([{"gamma": 0, "margin_shift_median": -0.5, "neutral_ratio": None}], "at gamma 0.5: shift −0.25"),  # noqa: RUF001
    ],
)
def test_what_was_not_measured_is_not_made_up(
    page: Page, server: Server, points: list[dict[str, Any]], words: str
) -> None:
    """Without pairs there is no shift, without neutral text no cost; and nothing is said beyond the points."""
    serve_certificate(page, server, {"curve": points})
    visit(page, server, "#/chat/formal")
    expect(curve(page)).to_be_visible()
    turn(page, "0.5")
    expect(curve(page).locator("figcaption")).to_have_text(words)
    expect(curve(page)).not_to_contain_text("claimed")


def test_the_page_of_a_persona_has_the_figures(page: Page, server: Server) -> None:
    visit(page, server, "#/personas/curved")
    shown = page.locator(".certificate")
    expect(shown).to_contain_text("90 %")
    expect(shown).to_contain_text("the base knows 41 of 100")
    expect(shown).to_contain_text("13 %")  # of the answers loop
    page.get_by_text("At each gamma").click()
    expect(shown.get_by_role("row", name="0.25")).to_contain_text("× 1.050")  # noqa: RUF001
    expect(shown.get_by_role("row", name="0.25")).to_contain_text("96 %")


def test_an_interval_without_an_end_is_left_out(page: Page, server: Server) -> None:
    """As of a perplexity without a bound."""
    serve_certificate(page, server, {"own_ratio": 1.5, "intervals": {"own_ratio": [1.2, None]}})
    visit(page, server, "#/personas/formal")
    expect(page.locator(".figures")).to_contain_text("× 1.500")  # noqa: RUF001
    expect(page.locator(".figures")).not_to_contain_text("95 %")
