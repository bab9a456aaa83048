"""`/v1/responses`: answers to chats as OpenAI's newer API has them, stored for later turns."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from masquerade.errors import BadRequest, ResponseNotFound, StateConflict, UnsupportedParameter
from masquerade.generation.handler import respond_chat
from masquerade.http import errors
from masquerade.http.access import Chatting, ScopedRoute
from masquerade.http.dependencies import PERSONA_HEADER, Served, ServedResponses
from masquerade.http.wire import Deleted, Page, encode
from masquerade.jobs import ResponseTable, StoredResponse
from masquerade.openai.responses.answers import ResponseAnswer
from masquerade.openai.responses.objects import InputItemObject, ResponseObject, describe_response
from masquerade.openai.responses.schemas import InputItem, ItemReference, ResolvedItem, ResponseRequest, read_items

Json = dict[str, Any]

router = APIRouter(prefix="/v1/responses", route_class=ScopedRoute)
# Fields in the errors of a chat, and what they are called here.
_FIELDS = (
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^response_format\b"), "text.format"),
    (re.compile(r"^tools\.(\d+)\.function\b"), r"tools.\1"),
)


@router.post("", responses=describe_response(), openapi_extra=PERSONA_HEADER)
async def create_response(
    request: ResponseRequest, serving: Served, caller: Chatting, responses: ServedResponses, http: HTTPRequest
) -> Response:
    """Answer as a persona. With `previous_response_id`, the model is given that response and its input first.

    The persona and `instructions` are this request's, not the previous one's.
    """
    history, size = list[Json](), len(await http.body())
    if request.previous_response_id is not None:
        previous = await asyncio.to_thread(
            responses.get, request.previous_response_id, caller.owner, "previous_response_id"
        )
        history = [item for item in [*previous.input, *previous.body["output"]] if item["type"] != "reasoning"]
        size += len(encode(history))
    items, referred = await asyncio.to_thread(_resolve, responses, caller.owner, request.items())
    size += referred
    chat = request.chat([*read_items(history), *items])
    wanted = request.store is not False and responses.quotas.response_days > 0
    save = partial(_save, responses, caller.owner, history, items)
    make_answer = partial(ResponseAnswer, request=request, store=wanted, save=save)
    try:
        return await respond_chat(serving, chat, caller, http, make_answer, size)
    except BadRequest as error:
        _rename(error)
        raise


@router.get("/{response_id}", response_model=ResponseObject)
def show_response(
    response_id: str, caller: Chatting, responses: ServedResponses, stream: bool | None = None
) -> Response:
    """A stored response of the key."""
    if stream:
        raise UnsupportedParameter("a stored response is not streamed again", param="stream")
    return _json(responses.get(response_id, caller.owner).body)


@router.delete("/{response_id}")
def delete_response(response_id: str, caller: Chatting, responses: ServedResponses) -> Deleted:
    """Delete a stored response. Responses that continue it keep copies of its items."""
    responses.remove(response_id, caller.owner)
    return Deleted(id=response_id, object="response")


@router.post("/{response_id}/cancel", response_model=ResponseObject)
def cancel_response(response_id: str, caller: Chatting, responses: ServedResponses) -> Response:
    """Always an error: only background responses can be cancelled, and there are none.

    To end a response early, close the connection.
    """
    responses.get(response_id, caller.owner)
    raise StateConflict("the response is finished; only one with `background` could be cancelled")


@router.get("/{response_id}/input_items")
def list_input_items(
    response_id: str,
    caller: Chatting,
    responses: ServedResponses,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Page[InputItemObject]:
    """What the model was given for a response, with the items of the responses that it continues.

    The last item is first, unless `order` is `asc`; `after` is the id of an item.
    """
    items = [*responses.get(response_id, caller.owner).input]
    items = items if order == "asc" else items[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise ResponseNotFound(f"there is no item {after!r:.80} to continue after", param="after")
        items = items[ids.index(after) + 1 :]
    shown = [InputItemObject.model_validate(item) for item in items[:limit]]
    first, last = (items[0]["id"], items[len(shown) - 1]["id"]) if shown else (None, None)
    return Page(data=shown, has_more=len(items) > limit, first_id=first, last_id=last)


def _resolve(responses: ResponseTable, owner: str, items: Sequence[InputItem]) -> tuple[list[ResolvedItem], int]:
    """Items with those of stored responses in place of references, and the bytes of the latter.

    Raises `ResponseNotFound`, also for an item that is referred to twice, which would make a long input of a short one.
    """
    outputs = dict[str, dict[str, Json]]()  # by response: its items that nothing has referred to
    resolved, size = list[ResolvedItem](), 0
    for number, item in enumerate(items):
        if not isinstance(item, ItemReference):
            resolved.append(item)
            continue
        if item.response_id not in outputs:
            outputs[item.response_id] = {one["id"]: one for one in responses.get_output(item.response_id, owner)}
        found = outputs[item.response_id].pop(item.id, None)
        if found is None:
            message = f"no stored response has an item {item.id!r:.80}, or the input refers to it twice"
            raise ResponseNotFound(message, param=f"input.{number}.id")
        resolved += read_items([found])
        size += len(encode(found))
    return resolved, size


def _rename(error: BadRequest) -> None:
    """Let the error of a chat name the field of the response."""
    param = error.param or ""
    for pattern, name in _FIELDS:
        if pattern.search(param):
            error.param = pattern.sub(name, param)
            error.args = (str(error).replace(f"`{param}`", f"`{error.param}`"),)


async def _save(
    responses: ResponseTable, owner: str, history: Sequence[Json], items: Sequence[ResolvedItem], body: Json
) -> bool:
    """Store a response with its input. An error is logged, and the response is sent all the same."""
    stored = StoredResponse(body, list(_name_items([*history, *(item.render() for item in items)])))
    try:
        await asyncio.to_thread(responses.add, owner, stored)
    except Exception as failure:
        errors.translate(failure, "storing a response")
        return False
    return True


def _name_items(items: Iterable[Json]) -> Iterator[Json]:
    """The items, each with an id of its own: clients may send one twice, and pages go on after an id."""
    taken = set[str]()
    for item in items:
        while item["id"] in taken:
            item = {**item, "id": f"{item['id'].rpartition('_')[0] or 'item'}_{uuid.uuid4().hex}"}
        taken.add(item["id"])
        yield item


def _json(value: Json) -> Response:
    return Response(encode(value), media_type="application/json")
