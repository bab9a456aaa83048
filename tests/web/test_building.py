"""The playground's build page: from files, from a system prompt, from a character card, to a first answer."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import httpx
from playwright.sync_api import Page, expect

from masquerade import demo
from tests.serving import Server
from tests.web.driving import choose, column, done, drop_zone, fill_form, fill_recipe, say, start_build, submit, visit

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
QUESTIONS = [
    json.loads(line)["messages"][-2]["content"]
    for line in (demo.DATA / "formal.train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
]


def test_from_a_dropped_file_to_a_first_answer(page: Page, server: Server, tmp_path: Path) -> None:
    start_build(page, server, "stiff", tmp_path)
    expect(page.locator(".stages progress").first).to_be_visible()
    expect(page.locator(".stages small").first).to_contain_text(" of ")
    page.get_by_role("link", name="Try it now").click()
    expect(column(page).get_by_label("Persona")).to_have_value("stiff")
    say(page, "Hello!")
    done(page)
    visit(page, server, "#/build")
    expect(page.locator(".jobs")).to_contain_text("demo:stiff")


def test_a_file_is_dropped_on_its_place(page: Page, server: Server) -> None:
    """With the mouse; and what is dropped beside is not opened."""
    visit(page, server, "#/build")
    make = """() => {
        const files = new DataTransfer();
        files.items.add(new File(['{"prompt": "a", "completion": "b"}\\n'], "mine.jsonl"));
        return files;
    }"""
    files = page.evaluate_handle(make)
    target = drop_zone(page, "Answers in character")
    target.dispatch_event("dragover", {"dataTransfer": files})
    expect(target).to_have_class("drop over")
    target.dispatch_event("drop", {"dataTransfer": files})
    expect(target).to_have_class("drop")
    expect(target).to_contain_text("mine.jsonl, 35 B: 1 line (1 × prompt and completion)")  # noqa: RUF001
    assert page.evaluate("() => !dispatchEvent(new DragEvent('drop', { cancelable: true }))")


def test_a_file_is_checked_as_it_is_dropped(page: Page, server: Server, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n[1]\n' + HOSTILE + "\n")
    visit(page, server, "#/build")
    choose(page, "Answers in character", bad)
    expect(page.get_by_role("alert")).to_contain_text("3 lines are bad")
    expect(drop_zone(page, "Answers in character")).to_contain_text("line 2: `completion` must be text")
    page.get_by_label("Name", exact=True).fill("never")
    submit(page)
    expect(page.get_by_text("bad.jsonl is not good yet")).to_be_visible()
    bad.write_bytes(b'{"text": "\xff"}\n')
    choose(page, "Answers in character", bad)
    expect(drop_zone(page, "Answers in character")).to_contain_text("line 1: not UTF-8 text")
    expect(page).to_have_title("Build · Masquerade")


def test_a_refused_build_says_why(page: Page, server: Server, tmp_path: Path) -> None:
    fill_form(page, server, "formal", tmp_path)
    submit(page)
    expect(page.get_by_role("alert")).to_contain_text("there is a persona 'formal'")


def test_strength_stands_in_front(page: Page, server: Server, tmp_path: Path) -> None:
    visit(page, server, "#/build")
    expect(page.get_by_label("Strength")).to_have_value("normal")
    expect(page.get_by_label("Score")).to_be_hidden()
    fill_form(page, server, "meek", tmp_path)
    page.get_by_label("Strength").select_option("gentle")
    submit(page)
    expect(page.get_by_role("heading", name="Build", exact=True)).to_be_visible()
    job = httpx.get(f"{server.base_url}/v1/fine_tuning/jobs/{page.url.rpartition('/')[2]}").json()
    assert job["method"]["mask"]["strength"] == "gentle"
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("strong.state")).to_have_text("cancelled")


def test_cancel(page: Page, server: Server, tmp_path: Path) -> None:
    start_build(page, server, "never", tmp_path)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("strong.state")).to_have_text("cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.locator(".buttons", has=page.locator("strong.state"))).to_contain_text("never")
    visit(page, server, "#/build")
    expect(page.locator(".jobs")).to_contain_text("demo:never")
    visit(page, server, "#/personas")
    expect(page.get_by_role("link", name="formal", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name="never", exact=True)).to_have_count(0)


def test_a_build_that_waits_is_queued_until_it_runs(page: Page, server: Server, tmp_path: Path) -> None:
    files = {
        side: (f"{side}.jsonl", (demo.DATA / f"{name}.train.jsonl").read_bytes())
        for side, name in (("file", "gloomy"), ("contrast", "cheerful"))
    }
    first = httpx.post(f"{server.base_url}/v1/personas", data={"name": "dour"}, files=files).json()
    start_build(page, server, "patient", tmp_path)
    state = page.locator("strong.state")
    expect(page.locator(".events")).to_contain_text("queued")
    expect(state).to_have_text("queued")
    httpx.post(f"{server.base_url}/v1/fine_tuning/jobs/{first['id']}/cancel")
    expect(page.locator(".events")).to_contain_text("running")
    expect(state).to_have_text(re.compile("running|succeeded"))


def test_a_file_that_changed_is_to_be_chosen_again(page: Page, server: Server, tmp_path: Path) -> None:
    fill_form(page, server, "edited", tmp_path)
    file = tmp_path / "casual.train.jsonl"
    file.write_text(file.read_text() + '{"prompt": "a", "completion": "b"}\n')
    later = time.time() + 10  # Chromium compares whole seconds
    os.utime(file, (later, later))
    submit(page)
    expect(page.get_by_role("alert")).to_contain_text("casual.train.jsonl has changed since it was chosen, or is gone")
    zone = drop_zone(page, "Answers of the opposite")
    expect(zone.locator(".found p")).to_have_count(0)
    choose(page, "Answers of the opposite", file)
    expect(zone).to_contain_text("65 lines")
    submit(page)
    expect(page.get_by_role("heading", name="Build", exact=True)).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("strong.state")).to_have_text("cancelled")


def test_a_system_prompt_becomes_a_persona(page: Page, server: Server, tmp_path: Path) -> None:
    visit(page, server, "#/build")
    page.get_by_label("A system prompt").check()
    expect(page.get_by_label("Answers in character")).to_be_hidden()
    page.get_by_label("System prompt", exact=True).fill("You are casual.")
    fill_recipe(page, "easygoing", tmp_path)
    submit(page)
    expect(page.get_by_role("alert")).to_have_text("Type some questions, or drop a file of them.")
    page.get_by_label("Questions", exact=True).fill("\n".join(QUESTIONS))
    submit(page)
    page.get_by_role("link", name="Everything about it").click()
    expect(page.get_by_role("row", name="System prompt")).to_contain_text("You are casual.")


def test_a_character_card_is_sent_with_its_questions(page: Page, server: Server, tmp_path: Path) -> None:
    """What becomes of it is the server's to test; here, that both arrive and are what they were."""
    card, questions = tmp_path / "mira.json", tmp_path / "questions.jsonl"
    card.write_text(json.dumps({"spec": "chara_card_v2", "data": {"description": "Mira is casual."}}))
    questions.write_text("".join(json.dumps({"question": one}) + "\n" for one in QUESTIONS))
    visit(page, server, "#/build")
    page.get_by_label("A character card").check()
    choose(page, "Character card", card)
    expect(drop_zone(page, "Character card")).to_contain_text("it has no `name`")
    card.write_text(json.dumps({"spec": "chara_card_v2", "data": {"name": "Mira", "description": "You are casual."}}))
    choose(page, "Character card", card)
    expect(drop_zone(page, "Character card")).to_contain_text("card of Mira")
    choose(page, "Or a file of questions", questions)
    expect(drop_zone(page, "Or a file of questions")).to_contain_text("40 × question")  # noqa: RUF001
    fill_recipe(page, "mira", tmp_path)
    submit(page)
    expect(page.get_by_role("heading", name="Build", exact=True)).to_be_visible()
    job = httpx.get(f"{server.base_url}/v1/fine_tuning/jobs/{page.url.rpartition('/')[2]}").json()
    for sent, file_id in ((card, job["method"]["mask"]["card_file"]), (questions, job["training_file"])):
        assert httpx.get(f"{server.base_url}/v1/files/{file_id}/content").content == sent.read_bytes()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("strong.state")).to_have_text("cancelled")
