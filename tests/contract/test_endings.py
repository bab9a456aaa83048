"""Fields of vLLM's that say where an answer ends, and what of it is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests import world
from tests.contract.asking import Api, Json, error_of
from tests.contract.here import serve_here
from tests.contract.test_completions import complete, texts, tokens_of

LIMIT = 40


@pytest.fixture(scope="module")
def random_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A random model, every byte a token, whose special tokens are as likely as others."""
    folder = tmp_path_factory.mktemp("endings") / "random"
    world.make_model(folder)
    with serve_here(folder, folder.parent / "store") as (_, http):
        yield Api(http)


def test_an_answer_goes_on_after_its_end(api: Api) -> None:
    whole = api.chat(max_tokens=LIMIT)
    assert whole["choices"][0]["finish_reason"] == "stop"
    longer = api.chat(max_tokens=LIMIT, ignore_eos=True)
    assert longer["choices"][0]["finish_reason"] == "length"
    assert longer["usage"]["completion_tokens"] == LIMIT
    assert longer["choices"][0]["message"]["content"].startswith(whole["choices"][0]["message"]["content"])
    assert api.text(ignore_eos=False) == api.text()


def test_a_stop_token_ends_it(api: Api) -> None:
    answer = texts(complete(api, "I like"))[0]
    ids = tokens_of(api, answer)
    word = api.http.post("/detokenize", json={"tokens": ids[2:3]}).json()["prompt"]
    assert ids[2] not in ids[:2]
    fields: Json = {"stop_token_ids": [ids[2], 0]}
    short = complete(api, "I like", **fields)
    assert short["choices"][0]["finish_reason"] == "stop"
    assert answer.startswith(texts(short)[0] + word)
    assert texts(complete(api, "I like", include_stop_str_in_output=True, **fields)) == [texts(short)[0] + word]
    assert texts(complete(api, "I like", ignore_eos=True, **fields)) == texts(short)
    assert texts(complete(api, "I like", min_tokens=4, **fields))[0] != texts(short)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_part_of_the_answer_if_told_so(api: Api, stream: bool) -> None:
    whole = api.text()
    stop = whole[8:13]
    say = api.streamed if stream else api.text
    assert say(stop=stop) == whole[: whole.index(stop)]
    assert say(stop=stop, include_stop_str_in_output=True) == whole[: whole.index(stop) + len(stop)]


def test_special_tokens_are_shown_if_told_so(random_api: Api) -> None:
    fields: Json = {"model": "random", "logit_bias": {"4": 100}, "max_tokens": 2}
    assert random_api.text(**fields) == ""
    assert random_api.text(**fields, skip_special_tokens=False) == "<|user|>" * 2
    assert random_api.text(**fields, skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "fields",
    [{"stop_token_ids": [10**6]}, {"stop_token_ids": [-1]}, {"stop_token_ids": [1] * 65}, {"stop_token_ids": ["a"]}],
    ids=lambda fields: str(fields)[:40],
)
def test_stop_tokens_that_do_not_exist_are_refused(api: Api, fields: Json) -> None:
    response = api.post(**fields)
    assert response.status_code == 400
    assert error_of(response)["param"].startswith("stop_token_ids")


def test_json_ends_where_ends_are_ignored(api: Api) -> None:
    """The end token is no part of it, and more tokens would not be JSON."""
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    fields: Json = {"response_format": schema, "ignore_eos": True, "skip_special_tokens": False}
    (end,) = api.http.post("/tokenize", json={"prompt": "<|end|>", "add_special_tokens": False}).json()["tokens"]
    assert isinstance(json.loads(api.text(**fields, logit_bias={str(end): 100})), int)
