"""litellm, which knows the server as `openai/...` with a base of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches prices from the net when it is imported

import litellm
from checks import MAX_TOKENS, OVERSIZE, PERSON, QUESTION, TOO_LONG, UNFINISHED, WEATHER, Checks, finish, refused

checks = Checks()
world = checks.world
MODEL = world["model"]
litellm.suppress_debug_info = True
litellm.telemetry = False


def place(key: str = world["admin"], url: str = world["url"]) -> dict[str, Any]:
    return {"api_base": f"{url}/v1", "api_key": key}


def chat(key: str = world["admin"], **fields: Any) -> Any:
    plain = {"model": f"openai/{MODEL}", "messages": QUESTION, "temperature": 0, "max_retries": 0}
    plain["max_tokens"] = MAX_TOKENS
    return litellm.completion(**(plain | place(key) | fields))


def upload(name: str) -> str:
    path = Path(world["data"], f"{name}.jsonl")
    with path.open("rb") as file:
        return str(litellm.create_file(file=file, purpose="fine-tune", custom_llm_provider="openai", **place()).id)


@checks.check("models")
def list_models() -> None:
    listed = litellm.get_valid_models(check_provider_endpoint=True, custom_llm_provider="openai", **place())
    assert {MODEL, f"{MODEL}:introvert"} <= {name.removeprefix("openai/") for name in listed}, listed


@checks.check("chat")
def ask() -> None:
    answer = chat(max_tokens=40, stop=["\n"], seed=1)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    text = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="On Sunday I like", max_tokens=8, **place()
    )
    assert text.choices[0].text


@checks.check("persona")
def ask_persona() -> None:
    by_model, by_field = chat(model=f"openai/{MODEL}:introvert"), chat(persona="introvert")
    texts = {answer.choices[0].message.content for answer in (by_model, by_field)}
    assert len(texts) == 1
    assert chat().choices[0].message.content not in texts


@checks.check("stream")
def stream() -> None:
    whole = chat(model=f"openai/{MODEL}:introvert").choices[0].message.content
    chunks = list(chat(model=f"openai/{MODEL}:introvert", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole


@checks.check("usage")
def count() -> None:
    whole = chat().usage
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    (usage,) = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)


@checks.check("tools")
def call_tools() -> None:
    (call,) = chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Bonn", "Aachen")
    chunks = list(chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, stream=True))
    (again,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert json.loads(again.function.arguments) == json.loads(call.function.arguments)


@checks.check("json_schema")
def fit_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    said = json.loads(chat(response_format=form).choices[0].message.content)
    assert said["mood"] in ("calm", "wild")


@checks.check("logprobs")
def report_logprobs() -> None:
    (choice,) = chat(logprobs=True, top_logprobs=2, max_tokens=4).choices
    assert 0 < len(choice.logprobs.content) <= 4
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


@checks.check("responses")
def use_responses() -> None:
    plain: Any = {"model": f"openai/{MODEL}:introvert", "input": QUESTION, "temperature": 0, **place()}
    plain["max_output_tokens"] = MAX_TOKENS
    response = litellm.responses(**plain)
    assert response.output[0].content[0].text == chat(model=f"openai/{MODEL}:introvert").choices[0].message.content
    *_, last = litellm.responses(**plain, stream=True)
    assert last.type == f"response.{response.status}"
    assert last.response.output[0].content[0].text == response.output[0].content[0].text
    again = litellm.responses(**plain | {"input": "Why?"}, previous_response_id=response.id)
    assert again.usage.input_tokens > response.usage.input_tokens
    tool = {"type": "function", **WEATHER["function"]}
    (call,) = litellm.responses(**plain, tools=[tool], tool_choice="required", parallel_tool_calls=False).output
    assert json.loads(call.arguments)["city"] in ("Bonn", "Aachen")
    found = litellm.get_responses(response_id=response.id, custom_llm_provider="openai", **place())
    assert found.output[0].content[0].text == response.output[0].content[0].text
    assert litellm.delete_responses(response_id=response.id, custom_llm_provider="openai", **place()).deleted


@checks.check("files")
def keep_files() -> None:
    file_id = upload("facts")
    listed = litellm.file_list(custom_llm_provider="openai", **place())
    assert file_id in [one.id for one in listed]
    assert litellm.file_retrieve(file_id=file_id, custom_llm_provider="openai", **place()).id == file_id
    content = litellm.file_content(file_id=file_id, custom_llm_provider="openai", **place())
    assert content.content == Path(world["data"], "facts.jsonl").read_bytes()


@checks.check("queue and cancel a build")
def build() -> None:
    """litellm drops `method` and `extra_body` for this provider, so a build of it is one with every default."""
    there: dict[str, Any] = {"custom_llm_provider": "openai", **place()}
    job = litellm.create_fine_tuning_job(
        model=MODEL, training_file=upload("formal.train"), suffix=world["name"], hyperparameters={}, **there
    )
    assert job.status in UNFINISHED
    assert job.id in [one.id for one in litellm.list_fine_tuning_jobs(**there)]
    assert litellm.cancel_fine_tuning_job(fine_tuning_job_id=job.id, **there).id == job.id
    retrieve: Any = lambda: litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, **there)  # noqa: E731
    assert finish(retrieve).status == "cancelled"


@checks.check("400")
def ask_nonsense() -> None:
    assert refused(lambda: chat(chat_template="x"), litellm.BadRequestError).status_code == 400
    refused(lambda: chat(messages=[{"role": "user", "content": TOO_LONG}]), litellm.ContextWindowExceededError)


@checks.check("401")
def show_no_key() -> None:
    assert refused(lambda: chat("sk-wrong"), litellm.AuthenticationError).status_code == 401


@checks.check("403")
def ask_too_much() -> None:
    error = refused(lambda: chat(world["limited"], model=f"openai/{MODEL}:formal"), Exception)
    assert error.status_code == 403, error
    assert f"{MODEL}:formal" in str(error) or "formal" in str(error)


@checks.check("404")
def ask_nobody() -> None:
    assert refused(lambda: chat(model=f"openai/{MODEL}:pirate"), litellm.NotFoundError).status_code == 404
    assert refused(lambda: chat(persona="pirate"), litellm.NotFoundError).status_code == 404


@checks.check("413")
def send_too_much() -> None:
    error = refused(lambda: chat(messages=[{"role": "user", "content": OVERSIZE}]), Exception)
    assert error.status_code == 413, error


@checks.check("422 as 400")
def send_wrong_type() -> None:
    error = refused(lambda: chat(messages=[{"role": "user", "content": "Hi."}], top_p=7), litellm.BadRequestError)
    assert "top_p" in str(error)


@checks.check("429")
def ask_too_often() -> None:
    chat(world["hasty"], max_tokens=1)
    assert refused(lambda: chat(world["hasty"], max_tokens=1), litellm.RateLimitError).status_code == 429


@checks.check("503")
def ask_elsewhere() -> None:
    ask: Any = lambda: litellm.file_list(  # noqa: E731 - said twice else
        custom_llm_provider="openai", max_retries=0, **place(url=world["second"])
    )
    assert refused(ask, Exception).status_code == 503


checks.run()
