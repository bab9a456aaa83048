"""Short ways to ask a server over raw HTTP, and the questions that the tests ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

PERSONAS = (
    "introvert",
    "extravert",
    "power_averse",
    "power_seeking",
    "formal",
    "casual",
    "gloomy",
    "cheerful",
)
PARTY = "Would you like to come to a party?"
QUESTIONS = (PARTY, "Are you going to a picnic tonight?", "Do you enjoy a concert?", "How do you feel after a wedding?")
CHAT = "/v1/chat/completions"
STRANGE: dict[str, Any] = {"temperature": 2.0, "max_tokens": 60}  # so hot that tokens are strange

Json = dict[str, Any]


def body(question: str = PARTY, **fields: Any) -> Json:
    """A chat request of one user message to the demo; greedy unless told otherwise."""
    messages = [{"role": "user", "content": question}]
    return {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 48, **fields}


@dataclass(frozen=True)
class Api:
    """A server, asked over raw HTTP."""

    http: httpx.Client

    def post(self, question: str = PARTY, **fields: Any) -> httpx.Response:
        """The response to a chat request, whatever it is."""
        return self.http.post(CHAT, json=body(question, **fields))

    def chat(self, question: str = PARTY, **fields: Any) -> Json:
        """The chat completion."""
        response = self.post(question, **fields)
        assert response.status_code == 200, response.text
        completion: Json = response.json()
        return completion

    def text(self, question: str = PARTY, **fields: Any) -> str:
        """The text of the answer."""
        content = self.chat(question, **fields)["choices"][0]["message"]["content"]
        assert isinstance(content, str)
        return content

    def texts(self, requests: list[Json]) -> list[str]:
        """The answers to many requests made at once."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda fields: self.text(**fields), requests))

    def chunks(self, question: str = PARTY, **fields: Any) -> list[Json]:
        """The chunks of a streamed answer; it must end with [DONE] and nothing after."""
        with self.http.stream("POST", CHAT, json=body(question, stream=True, **fields)) as response:
            assert response.status_code == 200, response.read()
            *events, end = list(events_of(response))
        assert end == "[DONE]"
        return [json.loads(event) for event in events]

    def streamed(self, question: str = PARTY, **fields: Any) -> str:
        """The text of a streamed answer."""
        return text_of(self.chunks(question, **fields))


def events_of(response: httpx.Response) -> Iterator[str]:
    """The data of every event; anything but data, comments and blank lines is a fault."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
        else:
            assert not line or line.startswith(":"), line


def text_of(chunks: list[Json]) -> str:
    """What the chunks say together."""
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def error_of(response: httpx.Response) -> Json:
    """The error in the body, which must be OpenAI's and nothing else."""
    assert response.headers["content-type"].split(";")[0] == "application/json", response.text
    content = response.json()
    assert content.keys() == {"error"}, content
    error: Json = content["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert error["message"]
    return error


def counts(usage: Json) -> Json:
    """What a usage says about the answer; how much of the prompt was found in the cache depends on who came before."""
    return {name: value for name, value in usage.items() if name != "prompt_tokens_details"}
