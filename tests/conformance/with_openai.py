"""The stock openai SDK, whichever version is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
from checks import MAX_TOKENS, OVERSIZE, PERSON, QUESTION, RECIPE, TOO_LONG, WEATHER, Checks, finish, refused
from openai import OpenAI

checks = Checks()
LOGPROBS: Any = "message.output_text.logprobs"
world = checks.world
MODEL = world["model"]


def connect(key: str = world["admin"], url: str = world["url"], **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120, **options)


client = connect()


def chat(by: OpenAI = client, **fields: Any) -> Any:
    plain = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": MAX_TOKENS}
    return by.chat.completions.create(**(plain | fields))


def upload(name: str) -> str:
    return client.files.create(file=Path(world["data"], f"{name}.jsonl"), purpose="fine-tune").id


@checks.check("models")
def list_models() -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {MODEL, f"{MODEL}:introvert"} <= set(listed), listed
    found = client.models.retrieve(f"{MODEL}:introvert")
    assert (found.id, found.object) == (f"{MODEL}:introvert", "model")
    assert found.model_extra["parent"] == MODEL


@checks.check("chat")
def ask() -> None:
    answer = chat(max_completion_tokens=40, seed=1, stop=["\n"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.system_fingerprint
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
    ]
    assert chat(messages=parts, max_completion_tokens=5).usage.completion_tokens <= 5
    assert client.completions.create(model=MODEL, prompt="On Sunday I like", max_tokens=8).choices[0].text


@checks.check("persona")
def ask_persona() -> None:
    by_model = chat(model=f"{MODEL}:introvert")
    assert (by_model.model, by_model.model_extra["persona"]) == (f"{MODEL}:introvert", "introvert")
    by_field = chat(extra_body={"persona": "introvert"})
    by_header = chat(connect(default_headers={"X-Persona": "introvert"}))
    texts = {answer.choices[0].message.content for answer in (by_model, by_field, by_header)}
    assert len(texts) == 1
    assert chat().choices[0].message.content not in texts


@checks.check("stream")
def stream() -> None:
    (whole,) = chat(model=f"{MODEL}:introvert").choices
    chunks = list(chat(model=f"{MODEL}:introvert", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


@checks.check("usage")
def count() -> None:
    whole = chat().usage
    *others, last = chat(stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in others)
    assert not last.choices
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert whole.total_tokens == whole.prompt_tokens + whole.completion_tokens


@checks.check("tools")
def call_tools() -> None:
    answer = chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments)["city"] in ("Bonn", "Aachen")
    deltas = [chunk.choices[0].delta for chunk in chat(tools=[WEATHER], tool_choice="required", stream=True)]
    parts = [part for delta in deltas for part in delta.tool_calls or [] if part.index == 0]
    assert parts[0].function.name == "weather"
    assert json.loads("".join(part.function.arguments or "" for part in parts))
    told = {"role": "tool", "tool_call_id": call.id, "content": "dry"}
    said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    assert chat(messages=[*QUESTION, said, told], tools=[WEATHER], tool_choice="none").choices[0].message.content


@checks.check("json_schema")
def fit_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    said = json.loads(chat(response_format=form).choices[0].message.content)
    assert set(said) == {"mood", "age"}
    assert said["mood"] in ("calm", "wild")
    anything = chat(response_format={"type": "json_object"}, max_completion_tokens=40).choices[0]
    assert anything.message.content.startswith("{")
    assert anything.finish_reason == "length" or isinstance(json.loads(anything.message.content), dict)


@checks.check("logprobs")
def report_logprobs() -> None:
    (choice,) = chat(logprobs=True, top_logprobs=3, max_completion_tokens=6).choices
    assert 0 < len(choice.logprobs.content) <= 6
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy: what was chosen is the likeliest
    assert chat(logit_bias={"5": -100}, max_completion_tokens=2).choices[0].message.content is not None


@checks.check("responses")
def use_responses() -> None:
    plain: Any = {"model": f"{MODEL}:introvert", "input": QUESTION, "temperature": 0, "max_output_tokens": MAX_TOKENS}
    response = client.responses.create(**plain)
    assert response.output_text == chat(model=f"{MODEL}:introvert").choices[0].message.content
    assert response.usage.input_tokens_details.cached_tokens >= 0
    with client.responses.stream(**plain) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == response.output_text
    second = client.responses.create(**plain | {"input": "Why?"}, previous_response_id=response.id)
    assert len(list(client.responses.input_items.list(second.id))) == 3
    assert client.responses.retrieve(second.id).output_text == second.output_text
    form = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    assert json.loads(client.responses.create(**plain, text={"format": form}).output_text)["mood"] in ("calm", "wild")
    tool = {"type": "function", **WEATHER["function"]}
    (call,) = client.responses.create(
        **plain, tools=[tool], tool_choice="required", parallel_tool_calls=False, include=[LOGPROBS]
    ).output
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "dry"}
    said = [*QUESTION, call.model_dump(exclude_none=True), told]
    assert client.responses.create(**plain | {"input": said}).output_text
    client.responses.delete(second.id)
    assert refused(lambda: client.responses.retrieve(second.id), openai.NotFoundError).code == "response_not_found"
    error = refused(lambda: client.responses.create(**plain, background=True), openai.BadRequestError)
    assert (error.code, error.param) == ("unsupported_parameter", "background")


@checks.check("files")
def keep_files() -> None:
    file = client.files.create(file=("notes.jsonl", b'{"text": "hello"}'), purpose="fine-tune")
    assert (file.bytes, file.filename, file.purpose) == (17, "notes.jsonl", "fine-tune")
    assert file.id in [one.id for one in client.files.list()]
    assert client.files.content(file.id).read() == b'{"text": "hello"}'
    assert client.files.delete(file.id).deleted


@checks.check("build a persona")
def build() -> None:
    training, contrast, facts = upload("formal.train"), upload("casual.train"), upload("facts")
    mask = RECIPE | {"contrast_file": contrast, "neutral_file": facts}
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=training,
        suffix=world["name"],
        extra_body={"method": {"type": "mask", "mask": mask}},
    )
    assert job.id in [one.id for one in client.fine_tuning.jobs.list()]
    done = finish(lambda: client.fine_tuning.jobs.retrieve(job.id))
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model == f"{MODEL}:{world['name']}"
    assert client.fine_tuning.jobs.list_events(job.id).data
    (point,) = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert point.fine_tuned_model_checkpoint.startswith(f"{MODEL}:{world['name']}@")
    assert client.files.content(done.result_files[0]).read()
    assert chat(model=done.fine_tuned_model).model_extra["persona"] == world["name"]


@checks.check("400")
def ask_nonsense() -> None:
    error = refused(lambda: chat(extra_body={"chat_template": "x"}), openai.BadRequestError)
    assert (error.code, error.param, error.type) == ("unsupported_parameter", "chat_template", "invalid_request_error")
    long = [{"role": "user", "content": TOO_LONG}]
    error = refused(lambda: chat(messages=long), openai.BadRequestError)
    assert error.code == "context_length_exceeded"
    error = refused(lambda: chat(model=f"{MODEL}:introvert", extra_body={"persona": "formal"}), openai.BadRequestError)
    assert (error.code, error.param) == ("persona_conflict", "persona")


@checks.check("401")
def show_no_key() -> None:
    error = refused(lambda: chat(connect("sk-wrong")), openai.AuthenticationError)
    assert (error.code, error.type) == ("invalid_api_key", "authentication_error")
    assert error.request_id


@checks.check("403")
def ask_too_much() -> None:
    limited = connect(world["limited"])
    error = refused(lambda: chat(limited, model=f"{MODEL}:formal"), openai.PermissionDeniedError)
    assert (error.code, error.type) == ("persona_forbidden", "permission_error")
    error = refused(lambda: limited.files.list(), openai.PermissionDeniedError)
    assert error.code == "scope_missing"
    assert chat(limited, model=f"{MODEL}:introvert").choices[0].message.content
    assert {model.id for model in limited.models.list()} == {MODEL, f"{MODEL}:introvert"}


@checks.check("404")
def ask_nobody() -> None:
    error = refused(lambda: chat(model=f"{MODEL}:pirate"), openai.NotFoundError)
    assert (error.code, error.param, error.type) == ("model_not_found", "model", "not_found_error")
    error = refused(lambda: chat(extra_body={"persona": "pirate"}), openai.NotFoundError)
    assert (error.code, error.param) == ("persona_not_found", "persona")
    assert refused(lambda: client.files.retrieve("file-none"), openai.NotFoundError).code == "file_not_found"
    assert refused(lambda: client.fine_tuning.jobs.retrieve("ftjob-none"), openai.NotFoundError).code == "job_not_found"
    assert refused(lambda: client.moderations.create(input="x"), openai.NotFoundError).code == "not_found"


@checks.check("conflict")
def come_too_late() -> None:
    """What others answer with 409, which the SDK would ask again: a name that is taken, a generation that is not."""
    ids = upload("formal.train"), upload("casual.train")
    body = {"method": {"type": "mask", "mask": RECIPE | {"contrast_file": ids[1]}}}
    make = client.fine_tuning.jobs.create
    error = refused(
        lambda: make(model=MODEL, training_file=ids[0], suffix="formal", extra_body=body), openai.BadRequestError
    )
    assert (error.code, error.param) == ("persona_exists", "suffix")
    stale = {"headers": {"If-Match": '"00000000"'}}
    error = refused(lambda: client.delete("/personas/formal", cast_to=object, options=stale), openai.APIStatusError)
    assert (error.status_code, error.code) == (412, "generation_conflict")


@checks.check("413")
def send_too_much() -> None:
    long = [{"role": "user", "content": OVERSIZE}]
    error = refused(lambda: chat(messages=long), openai.APIStatusError)
    assert (error.status_code, error.code) == (413, "body_too_large")


@checks.check("422 as 400")
def send_wrong_type() -> None:
    error = refused(lambda: chat(messages=[{"role": "pirate", "content": "Hi."}]), openai.BadRequestError)
    assert (error.code, error.param) == ("invalid_value", "messages.0.role")
    error = refused(lambda: chat(temperature="hot"), openai.BadRequestError)
    assert (error.code, error.param) == ("invalid_value", "temperature")


@checks.check("429")
def ask_too_often() -> None:
    hasty = connect(world["hasty"])
    chat(hasty, max_completion_tokens=1)
    error = refused(lambda: chat(hasty, max_completion_tokens=1), openai.RateLimitError)
    assert (error.code, error.type) == ("rate_limited", "rate_limit_error")
    assert 0 < int(error.response.headers["Retry-After"]) <= 60
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0"


@checks.check("503")
def ask_elsewhere() -> None:
    error = refused(lambda: connect(url=world["second"]).files.list(), openai.InternalServerError)
    assert (error.status_code, error.code, error.type) == (503, "not_ready", "server_error")


checks.run()
