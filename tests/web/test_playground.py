"""The playground, driven as its users do, in Chromium against a real server."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from masquerade import demo
from tests.serving import Server, serve
from tests.web.driving import column, done, say, visit
from tests.world import make_model

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


def body_of(route: Route) -> Any:
    return json.loads(route.request.post_data or "")


def test_chat(page: Page, server: Server) -> None:
    visit(page, server)
    column(page).get_by_label("Persona").select_option("formal")
    say(page, "Hello! How was your weekend?")
    expect(done(page)).to_contain_text(
        re.compile(r"first token \d+ ms · [\d.]+ tokens/s · .* · generation [0-9a-f]{8}")
    )
    expect(column(page).locator(".answer")).not_to_be_empty()
    column(page).get_by_text("Certificate").click()
    expect(column(page).get_by_role("row", name="score")).to_contain_text("attribution")
    column(page).get_by_text("This request as code").click()
    expect(column(page).locator("pre")).to_have_count(2)
    curl, python = column(page).locator("pre").all_inner_texts()
    assert '"persona": "formal"' in curl
    assert "How was your weekend?" in curl
    assert 'extra_body={"persona":"formal","gamma":0}' in python
    compile(python, "the page", "exec")


def test_the_code_follows_the_settings(page: Page, server: Server) -> None:
    visit(page, server, "#/chat/casual")
    column(page).get_by_text("This request as code").click()
    page.get_by_text("Settings").click()
    page.get_by_label("Seed").fill("7")
    expect(column(page).locator("pre").first).to_contain_text('"seed": 7')


def test_a_link_to_a_persona_that_is_gone_says_so(page: Page, server: Server) -> None:
    visit(page, server, "#/chat/nobody")
    expect(page.get_by_text("There is no persona nobody here.")).to_be_visible()
    expect(column(page)).to_have_count(1)


def test_thoughts_are_shown_apart_from_the_answer(page: Page, server: Server) -> None:
    deltas = [{"reasoning_content": "Hm. "}, {"reasoning_content": "Dry?"}, {"content": "Yes."}]
    events = [json.dumps({"choices": [{"delta": delta}], "usage": None, "generation": None}) for delta in deltas]
    stream = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    visit(page, server)
    say(page, "Is it dry?")
    expect(column(page).locator(".answer")).to_have_text("Yes.")
    column(page).get_by_text("Thoughts").click()
    expect(column(page).locator(".thoughts")).to_contain_text("Hm. Dry?")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "And now?")
    assert asked.value.post_data_json["messages"][1] == {"role": "assistant", "content": "Yes."}


def test_the_copied_python_runs(page: Page, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    visit(page, server, "#/chat/casual")
    say(page, "Hello!")
    done(page)
    column(page).get_by_text("This request as code").click()
    exec(column(page).locator("pre").nth(1).inner_text(), {})
    assert capsys.readouterr().out.strip()


def test_four_side_by_side(page: Page, server: Server) -> None:
    visit(page, server)
    more = page.get_by_role("button", name="Compare with another")
    for _ in range(3):
        more.click()
    expect(more).to_be_disabled()
    happened: list[str] = []
    page.on("request", lambda request: request.method == "POST" and happened.append("asked"))
    page.on("requestfinished", lambda request: request.method == "POST" and happened.append("answered"))
    say(page, "Hello!")
    for number in range(4):
        done(page, number)
    assert happened[:4] == ["asked"] * 4  # all of them before the first has ended
    said = [column(page, number).get_by_label("Persona").input_value() for number in range(4)]
    assert len(set(said)) == 4
    column(page, 3).get_by_role("button", name="Close this column").click()
    expect(page.locator(".column")).to_have_count(3)
    expect(more).to_be_enabled()


def test_gamma_counts_from_the_next_answer(page: Page, server: Server) -> None:
    asked = []

    def note(route: Route) -> None:
        asked.append(body_of(route))
        route.continue_()

    page.route("**/v1/chat/completions", note)
    visit(page, server, "#/chat/formal")
    say(page, "Hello!")
    done(page)
    column(page).get_by_label("Gamma").fill("0.5")
    expect(column(page).locator("output")).to_have_text("0.50")
    say(page, "And now?")
    expect(column(page).locator(".answer").nth(1)).not_to_have_attribute("aria-busy", "true")
    assert [body["gamma"] for body in asked] == [0, 0.5]
    assert [message["role"] for message in asked[1]["messages"]] == ["user", "assistant", "user"]


def test_what_a_persona_prunes_and_how_it_differs(page: Page, server: Server) -> None:
    visit(page, server, "#/personas")
    page.get_by_role("link", name="formal", exact=True).click()
    prunes, differs = page.locator(".heatmap").nth(0), page.locator(".heatmap").nth(1)
    expect(prunes.locator(".heat")).to_have_count(28)
    expect(prunes).to_contain_text("0.30 % in all")
    expect(page.get_by_label("Other persona")).to_have_value("casual")
    expect(differs).to_contain_text("0.60 % in all")
    page.get_by_label("Other persona").select_option("gloomy")
    expect(differs.locator("caption")).not_to_contain_text("0.60 %")


def test_a_claimed_certificate_shows_no_verdict(page: Page, server: Server) -> None:
    """Whatever its maker says; one that the server has measured shows its own."""
    verdict = {"passed": False, "forced": True, "reasons": ["made up"], "remarks": ["made up too"]}
    persona = httpx.get(f"{server.base_url}/v1/personas/formal").json()
    assert persona["certificate_source"] == "claimed"  # it came with the demo
    persona["certificate"] |= verdict
    page.route("**/v1/personas/formal", lambda route: route.fulfill(json=persona))
    visit(page, server, "#/personas/formal")
    shown = page.locator(".certificate")
    expect(shown).to_contain_text("Claimed, not measured here.")
    expect(shown).to_contain_text("claimed by its maker")
    expect(shown).not_to_contain_text("force")
    expect(shown).not_to_contain_text("made up")
    persona["certificate_source"] = "measured"
    persona["signature"] = {"key": "ab" * 32, "covers": "tensors", "valid": True, "label": None}
    page.reload()
    expect(shown).to_contain_text("Published by force.")
    expect(shown).to_contain_text("measured by this server")
    expect(shown).to_contain_text("tensors only, by an untrusted key, abababab")


def test_rollback(page: Page, server: Server) -> None:
    for name in ("formal", "casual"):
        content = (demo.PERSONAS / f"{name}.safetensors").read_bytes()
        httpx.put(f"{server.base_url}/v1/personas/twin/content", content=content).raise_for_status()
    visit(page, server, "#/personas/twin")
    current = page.locator(".history li").filter(has_text="current")
    expect(current).to_contain_text("no. 2")
    page.get_by_role("button", name="Go back to no. 1").click()
    expect(current).to_contain_text("no. 1")
    assert httpx.get(f"{server.base_url}/v1/personas/twin").json()["number"] == 1


def test_text_is_never_html(page: Page, server: Server) -> None:
    """Neither in an answer, nor in a question, nor where a persona's name is shown."""
    chunk = {"choices": [{"delta": {"content": HOSTILE}}], "usage": None, "generation": "0" * 64}
    stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
    personas = httpx.get(f"{server.base_url}/v1/personas").json()
    personas["data"][0]["id"] = HOSTILE
    page.route("**/v1/personas", lambda route: route.fulfill(json=personas))
    visit(page, server)
    say(page, HOSTILE)
    expect(column(page).locator(".answer")).to_have_text(HOSTILE)
    expect(column(page).locator(".question")).to_have_text(HOSTILE)
    visit(page, server, "#/personas")
    expect(page.get_by_role("link", name=HOSTILE, exact=True)).to_be_visible()
    expect(page).to_have_title("Personas · Masquerade")
    assert page.locator("main img").count() == 0


def test_the_browser_is_told_to_stay_here(server: Server) -> None:
    for path in ("/", "/web/main.js", "/web/style.css", "/web/icon.svg"):
        answer = httpx.get(f"{server.base_url}{path}")
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
    assert httpx.get(f"{server.base_url}/web/../../pyproject.toml").status_code == 404


def test_nothing_comes_from_elsewhere(page: Page, server: Server) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    visit(page, server)
    done_with = column(page).get_by_label("Persona")
    expect(done_with).to_be_visible()
    assert asked
    assert all(url.startswith(server.base_url) for url in asked)


def test_a_server_that_stops_in_mid_answer(page: Page, tmp_path: Path) -> None:
    """The page says so, keeps what was said, and goes on when the server is back."""
    model = make_model(tmp_path / "model", max_position_embeddings=65536, num_hidden_layers=8)
    arguments = ("--model", str(model), "--store", str(tmp_path / "store"))
    with serve(*arguments) as first:
        page.route(
            "**/v1/chat/completions", lambda route: route.continue_(post_data=body_of(route) | {"min_tokens": 60000})
        )
        visit(page, first)
        say(page, "Tell me everything")
        expect(column(page).locator(".answer")).not_to_be_empty()
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        expect(page.get_by_role("alert")).to_contain_text("connection to the server was lost")
        expect(page.locator("#status")).to_contain_text("The server is gone")
    with serve(*arguments, port=int(first.base_url.rpartition(":")[2])):
        expect(page.locator("#status")).to_have_text("Ready")
        page.unroute("**/v1/chat/completions")
        page.get_by_label("Most tokens").evaluate("element => (element.value = 5)")
        page.get_by_role("button", name="Ask again").click()
        expect(done(page)).to_contain_text(re.compile(r"\+ [1-5] tokens"))
        expect(page.get_by_role("alert")).to_have_count(0)


def test_a_server_that_hangs_is_not_ready(page: Page) -> None:
    with serve("--model", "demo") as hung:
        visit(page, hung)
        expect(page.locator("#status")).to_have_text("Ready")
        hung.process.send_signal(signal.SIGSTOP)
        try:
            expect(page.locator("#status")).to_contain_text("does not answer")
        finally:
            hung.process.send_signal(signal.SIGCONT)
        expect(page.locator("#status")).to_have_text("Ready")
