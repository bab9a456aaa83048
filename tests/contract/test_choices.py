"""How an answer may be chosen, ended, shaped and multiplied."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from openai import OpenAI

from tests.contract.asking import PARTY, PERSONAS, QUESTIONS, Api, Json, text_of


def choice_of(completion: Json) -> Json:
    (choice,) = completion["choices"]
    return dict(choice)


def by_choice(chunks: list[Json]) -> list[str]:
    """The text of every choice of a stream."""
    indices = sorted({choice["index"] for chunk in chunks for choice in chunk["choices"]})
    return [
        text_of([{"choices": [c for c in chunk["choices"] if c["index"] == index]} for chunk in chunks])
        for index in indices
    ]


def cached(completion: Json) -> int:
    return int(completion["usage"]["prompt_tokens_details"]["cached_tokens"])


class TestStop:
    def test_an_answer_ends_before_the_stop_and_says_so(self, api: Api) -> None:
        whole = api.text()
        word = whole.split()[2]
        choice = choice_of(api.chat(stop=word))
        assert choice["message"]["content"] == whole[: whole.index(word)]
        assert choice["finish_reason"] == "stop"

    def test_the_first_of_several_counts(self, api: Api) -> None:
        whole = api.text()
        early, late = whole[4:7], whole[9:13]
        assert api.text(stop=[late, early, "never said"]) == whole[: min(whole.index(early), whole.index(late))]

    @pytest.mark.parametrize("question", QUESTIONS)
    @pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
    def test_no_chunk_leaks_a_part_of_it(self, api: Api, question: str, length: int) -> None:
        whole = api.text(question)
        stop = whole[len(whole) // 2 :][:length]
        chunks = api.chunks(question, stop=stop)
        assert text_of(chunks) == whole[: whole.index(stop)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    def test_what_only_begins_like_a_stop_is_given_out(self, api: Api) -> None:
        whole = api.text()
        assert api.streamed(stop=whole[-4:] + " and more") == whole

    @pytest.mark.parametrize("nothing", [None, "", [], [""]], ids=repr)
    def test_nothing_stops_nothing(self, api: Api, nothing: object) -> None:
        assert api.text(stop=nothing) == api.text()

    def test_stopped_tokens_are_few(self, api: Api) -> None:
        whole = api.chat()
        stopped = api.chat(stop=whole["choices"][0]["message"]["content"][5:8])
        assert stopped["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]


class TestChoices:
    def test_every_choice_has_its_index_and_is_whole(self, api: Api) -> None:
        completion = api.chat(n=3)
        assert [choice["index"] for choice in completion["choices"]] == [0, 1, 2]
        assert {choice["message"]["content"] for choice in completion["choices"]} == {api.text()}

    def test_the_prompt_counts_once(self, api: Api) -> None:
        one, three = api.chat()["usage"], api.chat(n=3)["usage"]
        assert three["prompt_tokens"] == one["prompt_tokens"]
        assert three["completion_tokens"] == 3 * one["completion_tokens"]

    def test_choices_differ_and_count_the_seed_on(self, api: Api) -> None:
        hot: Json = {"temperature": 1.5, "max_tokens": 20}
        choices = [choice["message"]["content"] for choice in api.chat(n=4, seed=7, **hot)["choices"]]
        assert len(set(choices)) > 1
        assert choices == [api.text(seed=seed, **hot) for seed in range(7, 11)]

    def test_choices_without_a_seed_differ(self, api: Api) -> None:
        choices = api.chat(n=6, temperature=1.5)["choices"]
        assert len({choice["message"]["content"] for choice in choices}) > 1

    def test_a_stream_carries_all_of_them(self, api: Api) -> None:
        hot: Json = {"temperature": 1.2, "seed": 3, "n": 3, "persona": "cheerful"}
        chunks = api.chunks(**hot)
        assert by_choice(chunks) == [choice["message"]["content"] for choice in api.chat(**hot)["choices"]]
        ends = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
        assert sorted(choice["index"] for choice in ends) == [0, 1, 2]

    def test_the_sdk_reads_them(self, sdk: OpenAI) -> None:
        completion = sdk.chat.completions.create(
            model="demo:formal", messages=[{"role": "user", "content": PARTY}], n=2, stop=["."], max_tokens=48
        )
        assert [choice.index for choice in completion.choices] == [0, 1]


class TestLogprobs:
    def test_there_is_one_for_every_token(self, api: Api) -> None:
        completion = api.chat(logprobs=True)
        content = choice_of(completion)["logprobs"]["content"]
        assert len(content) == completion["usage"]["completion_tokens"]
        assert b"".join(bytes(entry["bytes"]) for entry in content).decode().strip() == api.text()
        assert all(entry["logprob"] <= 0 and entry["top_logprobs"] == [] for entry in content)

    def test_the_likeliest_is_the_greedy_choice(self, api: Api) -> None:
        for entry in choice_of(api.chat(logprobs=True, top_logprobs=5))["logprobs"]["content"]:
            logprobs = [other["logprob"] for other in entry["top_logprobs"]]
            assert len(logprobs) == 5
            assert logprobs == sorted(logprobs, reverse=True)
            assert entry["top_logprobs"][0]["token"] == entry["token"]
            assert logprobs[0] == entry["logprob"]
            assert sum(map(math.exp, logprobs)) <= 1 + 1e-5

    def test_a_stream_carries_the_same(self, api: Api) -> None:
        fields: Json = {"logprobs": True, "top_logprobs": 2, "persona": "gloomy"}
        streamed = [
            entry
            for chunk in api.chunks(**fields)
            for choice in chunk["choices"]
            for entry in (choice["logprobs"] or {"content": []})["content"]
        ]
        whole = choice_of(api.chat(**fields))["logprobs"]["content"]
        assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]
        assert [entry["logprob"] for entry in streamed] == pytest.approx(
            [entry["logprob"] for entry in whole], abs=1e-4
        )

    def test_they_are_absent_when_not_asked_for(self, api: Api) -> None:
        assert choice_of(api.chat())["logprobs"] is None
        assert choice_of(api.chat(logprobs=False))["logprobs"] is None

    def test_the_sdk_reads_them(self, sdk: OpenAI) -> None:
        completion = sdk.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": PARTY}],
            logprobs=True,
            top_logprobs=2,
            max_tokens=4,
            temperature=0,
        )
        logprobs = completion.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 4


class TestSampling:
    def test_a_bias_forces_and_forbids(self, api: Api) -> None:
        first = api.chat(logprobs=True)
        spoken = [entry["token"] for entry in choice_of(first)["logprobs"]["content"]]
        forced = choice_of(api.chat(logit_bias={"500": 100}, max_tokens=3, logprobs=True))["logprobs"]["content"]
        (token,) = {entry["token"] for entry in forced}
        assert token not in spoken
        assert choice_of(api.chat(logit_bias={"500": -100}, max_tokens=3))["message"]["content"] == api.text(
            max_tokens=3
        )
        forbidden = api.chat(logit_bias={str(number): -100 for number in range(300)}, logprobs=True)
        assert choice_of(forbidden)["message"]["content"] != choice_of(first)["message"]["content"]

    @pytest.mark.parametrize(
        "fields", [{"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 5.0}], ids=str
    )
    def test_penalties_make_an_answer_repeat_less(self, api: Api, fields: Json) -> None:
        def variety(**more: Any) -> float:
            content = choice_of(api.chat(max_tokens=100, min_tokens=100, logprobs=True, **more))["logprobs"]["content"]
            return len({entry["token"] for entry in content}) / len(content)

        assert variety(**fields) > variety()

    def test_an_answer_has_its_least_length(self, api: Api) -> None:
        short = api.chat(max_tokens=200)["usage"]["completion_tokens"]
        assert api.chat(max_tokens=200, min_tokens=short + 9)["usage"]["completion_tokens"] >= short + 9

    def test_min_p_of_everything_is_greedy(self, api: Api) -> None:
        assert api.text(temperature=1.5, seed=1, min_p=1.0) == api.text()

    @pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-38, 1e-9])
    def test_a_temperature_next_to_nothing_is_greedy(self, api: Api, temperature: float) -> None:
        assert api.text(temperature=temperature, seed=1) == api.text()


class TestCache:
    @pytest.mark.one_cache
    def test_the_second_time_most_of_a_prompt_is_found(self, api: Api) -> None:
        question = "Tell me about a day that you liked very much, and what you did after it. " * 2
        first, second = (api.chat(question)["usage"] for _ in range(2))
        assert first["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens_details"]["cached_tokens"]
        assert (
            second["prompt_tokens"] - 16 <= second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]
        )

    @pytest.mark.one_cache
    @pytest.mark.parametrize("phase", ["all", "decode"])
    def test_personas_find_each_others_prompt_in_phase_decode_only(self, api: Api, phase: str) -> None:
        """And answer as if they had not."""
        question = f"What do you think of a walk in the {phase} rain, alone or with many friends, at night? " * 2
        asked: list[Json] = [
            {"question": question, "persona": persona, "persona_phase": phase} for persona in PERSONAS[:4]
        ]
        first, again = ([api.chat(**fields) for fields in asked] for _ in range(2))
        texts = [choice_of(completion)["message"]["content"] for completion in first]
        assert texts == [choice_of(completion)["message"]["content"] for completion in again]
        assert len(set(texts)) > 1
        others = [cached(completion) for completion in first[1:]]
        if phase == "decode":
            assert min(others) >= 32
        else:
            assert max(others) == 0
        assert min(map(cached, again)) >= 32

    def test_a_persona_that_joins_a_conversation_hears_it_anew(self, api: Api) -> None:
        """In phase `all` nothing that another one heard is of use to it, and it answers as if it had been there."""
        said = "Last week we met a man with a boat, who asked whether we would come along on the river with him. " * 2
        history: list[Json] = [{"role": "user", "content": said}, {"role": "assistant", "content": "That was nice."}]
        turn: Json = {"messages": [*history, {"role": "user", "content": PARTY}], "persona_phase": "all"}
        first = api.chat(persona="gloomy", **turn)
        joined = api.chat(persona="cheerful", **turn)
        again = api.chat(persona="cheerful", **turn)
        assert cached(joined) == 0
        assert cached(again) > 64
        assert joined["choices"] == again["choices"]
        assert choice_of(joined)["message"]["content"] != choice_of(first)["message"]["content"]


class TestFormat:
    SCHEMA: Json = {  # noqa: RUF012
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "guests": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["mood", "guests"],
        "additionalProperties": False,
    }

    def asked(self, schema: Json) -> Json:
        return {"type": "json_schema", "json_schema": {"name": "party", "schema": schema, "strict": True}}

    @pytest.mark.parametrize("persona", [None, "introvert", "cheerful"])
    @pytest.mark.parametrize("temperature", [0, 1.5])
    def test_an_answer_fits_its_schema(self, api: Api, persona: str | None, temperature: float) -> None:
        choice = choice_of(
            api.chat(
                persona=persona,
                temperature=temperature,
                seed=2,
                max_tokens=150,
                response_format=self.asked(self.SCHEMA),
            )
        )
        assert choice["finish_reason"] == "stop"
        answer = json.loads(choice["message"]["content"])
        assert answer.keys() == {"mood", "guests"}
        assert answer["mood"] in ("good", "bad")
        assert 1 <= answer["guests"] <= 99

    def test_every_choice_has_a_grammar_of_its_own(self, api: Api) -> None:
        completion = api.chat(
            n=4, temperature=1.5, seed=0, max_tokens=150, response_format=self.asked(self.SCHEMA), stream=False
        )
        answers = [json.loads(choice["message"]["content"]) for choice in completion["choices"]]
        assert len(answers) == 4

    def test_any_object_begins_as_one(self, api: Api) -> None:
        assert api.text(max_tokens=20, response_format={"type": "json_object"}).lstrip().startswith("{")

    def test_text_is_what_there_is_without(self, api: Api) -> None:
        assert api.text(response_format={"type": "text"}) == api.text()

    def test_a_stream_says_what_one_piece_says(self, api: Api) -> None:
        fields: Json = {"max_tokens": 150, "response_format": self.asked(self.SCHEMA)}
        assert api.streamed(**fields) == api.text(**fields)
