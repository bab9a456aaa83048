"""The conversation of `masq chat`: what a question follows, also after one that failed or was interrupted."""

from __future__ import annotations

import pytest

from masquerade_client import BadRequest, Client
from masquerade_client.cli.chat import Conversation
from tests.client.scripted import Answer, Handler, Script, answer_in, say, stream

SYSTEM = {"role": "system", "content": "Be brief."}
FAILS = say({"error": {"message": "no", "code": "invalid_value"}}, 400)


def test_a_question_that_failed_is_asked_again_after_what_came_before(script: Script) -> None:
    bodies = []

    def record(answer: Answer) -> Answer:
        def respond(handler: Handler) -> None:
            bodies.append([message["content"] for message in script.body["messages"]])
            answer(handler)

        return respond

    with Client(script.base_url, retries=0) as client:
        talk = Conversation(client, {}, None, None, [SYSTEM])
        script.answer = record(FAILS)
        for ask in (lambda: talk.ask("one"), talk.retry):
            with pytest.raises(BadRequest):
                ask()
        script.answer = record(stream(*answer_in("Yes.")))
        talk.retry()
        script.answer = record(FAILS)
        with pytest.raises(BadRequest):
            talk.ask("two")
        script.answer = record(stream(*answer_in("No.")))
        talk.retry()
        talk.retry()
    one = ["Be brief.", "one"]
    two = [*one, "Yes.", "two"]
    assert bodies == [one, one, one, two, two, two]
    assert [message["content"] for message in talk.messages] == [*two, "No."]
