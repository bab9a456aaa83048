"""Handles a request: resolves its persona, runs it on the engine, and sends the answer as a stream or in one piece."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response

from masquerade.engine import AnswerFormat, AnswerText, Grammar, Request
from masquerade.errors import ContextTooLong, InvalidValue
from masquerade.generation.answers import Answer
from masquerade.generation.outputs import OutputCollector, Receive, collect_deltas, wait_for_disconnect
from masquerade.generation.prompts import context_room, tokenise_chat
from masquerade.generation.requests import ChatRequest, GenerationRequest, PersonaFields
from masquerade.generation.tools import ToolSet, select_tools
from masquerade.http.access import Caller
from masquerade.http.dependencies import read_persona
from masquerade.http.wire import respond_events
from masquerade.model import Base, Room, ThoughtStart, find_dialect, find_thought_start
from masquerade.service.serving import ResolvedPersona, Serving

MAX_SCORES = 2**17  # log probabilities of prompts in one answer, which writes each with its token
DEFAULT_MAX_TOKENS = 2048  # of an answer to a request that sets no limit


async def resolve_persona(
    serving: Serving, request: PersonaFields, caller: Caller, http: HTTPRequest
) -> ResolvedPersona:
    """The persona of a request, with its mask on the device. Raises as `Serving.resolve_persona` does, and
    `PersonaForbidden`.

    What reads the prompt itself has a `default_phase` of its own, which goes before the persona's.
    """
    reference = serving.find_reference(request.model, request.persona, await read_persona(http))
    caller.check_reference(reference)
    gone = partial(wait_for_disconnect, http.receive)
    phase = request.persona_phase or (request.default_phase if reference else None)
    return await serving.resolve_persona(reference, request.gamma, phase, gone, caller.sees)


async def check_persona(
    serving: Serving, model: str, caller: Caller, persona: str | None = None, header: str | None = None
) -> None:
    """Raises as `resolve_persona` does for a persona that does not exist or is forbidden; no mask is loaded."""
    reference = serving.find_reference(model, persona, header)
    caller.check_reference(reference)
    if reference is not None:
        await serving.find_revision(reference, caller.sees)


async def respond_chat(
    serving: Serving,
    request: ChatRequest,
    caller: Caller,
    http: HTTPRequest,
    make_answer: Callable[[Base, ResolvedPersona, ToolSet | None], Answer],
    size: int | None = None,
) -> Response:
    """Answer a chat in the form of any API: `make_answer` makes its face.

    `size` is the bytes of all messages and tools; by default those of the body. Raises as `resolve_persona`,
    `tokenise_chat` and `respond` do, with the names of a chat's fields in `param`.
    """
    tokenizer = serving.base.tokenizer
    size = len(await http.body()) if size is None else size
    resolved = await resolve_persona(serving, request, caller, http)
    tool_set = select_tools(request, find_dialect(tokenizer), tokenizer) if request.tools else None
    tools = request.tools if tool_set else None
    options, room = request.template_options, context_room(serving)
    prompt = await tokenise_chat(serving, caller, size, request.messages, tools, room, options)
    thoughts = find_thought_start(tokenizer, prompt, request.continued_text)
    json_format = request.json_format
    if tool_set:
        answer_format = tool_set.answer_format(json_format)
    else:
        answer_format = AnswerFormat([json_format]) if json_format else None
    grammars = None
    if answer_format:
        compile_format = partial(serving.engine.grammars.compile, answer_format, request.n or 1, thoughts)
        grammars = await serving.workers.run(caller.share, size, compile_format)
    answer = make_answer(serving.base, resolved, tool_set)
    return await respond(serving, resolved, request, caller, [prompt], answer, http.receive, grammars, thoughts)


async def respond(
    serving: Serving,
    resolved: ResolvedPersona,
    request: GenerationRequest,
    caller: Caller,
    prompts: Sequence[list[int]],
    answer: Answer,
    receive: Receive,
    grammars: Sequence[Grammar] | None = None,
    thoughts: ThoughtStart | None = None,
) -> Response:
    """Generate `n` choices for each prompt, and answer with a stream or in one piece. Thoughts that start as `thoughts`
    says are split from the text.

    Raises every error of the request before the first byte is sent: `ContextTooLong` for a prompt that leaves no room
    for an answer, `InvalidValue` for a stop token that does not exist or too many log probabilities, and those of
    `Engine.submit`.
    """
    base = serving.base
    _check_scores(request, prompts)
    if unknown := next((token for token in request.stop_token_ids or () if token >= base.vocabulary), None):
        raise InvalidValue(
            f"token id {unknown} is outside of the vocabulary of {base.vocabulary}", param="stop_token_ids"
        )
    requests = [  # one for each choice of each prompt; only `emit` is left to set
        partial(
            Request,
            prompt=prompt,
            max_tokens=_max_tokens(request, context_room(serving), len(prompt)),
            applied=resolved.applied,
            phase=resolved.phase,
            sampling=request.sampling(choice),
            ends=request.ends(base.ends) | (base.ends if grammars else frozenset()),  # JSON ends, whatever is ignored
            reports_end=request.reports_end,
            prompt_logprobs=request.num_prompt_logprobs,
            min_tokens=request.min_tokens or 0,
            text=AnswerText(
                base.tokenizer,
                request.stops(),
                includes_stop=bool(request.include_stop_str_in_output),
                skips_special=request.skip_special_tokens is not False,
            ),
            grammar=grammars[choice] if grammars else None,
            owner=caller.share,
            priority=caller.priority,
        )
        for prompt in prompts
        for choice in range(request.n or 1)
    ]
    outputs = OutputCollector(serving, requests, caller, thoughts, streams=bool(request.stream))
    caller.record.begin(resolved, lambda: outputs.usage)
    outputs.start()
    if request.stream:
        return respond_events(_stream(outputs, answer), answer.headers)
    return await _respond_whole(outputs, answer, receive)


async def _respond_whole(outputs: OutputCollector, answer: Answer, receive: Receive) -> Response:
    """The answers in one piece."""
    deltas = await collect_deltas(outputs, receive)
    if outputs.disconnected:
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(await answer.body(deltas, outputs.usage), headers=answer.headers)


async def _stream(outputs: OutputCollector, answer: Answer) -> AsyncIterator[str]:
    """Server-sent events; the framework closes the iterator when the client disconnects."""
    try:
        yield answer.first_chunks(outputs.count, outputs.usage)
        async for deltas in outputs.deltas():
            yield "".join(map(answer.chunks, deltas)) if deltas else answer.ping
        yield await answer.last_chunks(outputs.usage)
    except Exception as failure:  # the status has been sent
        yield answer.error_chunk(outputs.fail(failure))
    finally:
        outputs.cancel()


def _max_tokens(request: GenerationRequest, room: Room, prompt: int) -> int:
    """The limit of a request; without one `DEFAULT_MAX_TOKENS`, or the minimum if that is more.

    The default, and with `ends_at_context` every limit, is cut to what the prompt leaves of the context.
    A small model may repeat itself forever. Without the limit, its answer would take the whole context, which is longer
    than the time limit of answers allows. Raises `ContextTooLong` if the prompt leaves nothing.
    """
    limit = request.max_new_tokens()
    if limit is not None and not request.ends_at_context:
        return limit
    if prompt >= room.tokens:
        raise ContextTooLong(
            f"{room.words} However, your messages resulted in {prompt} tokens, which leaves no room for an answer.",
            param="messages",
            tokens=prompt,
        )
    return min(room.tokens - prompt, limit or max(DEFAULT_MAX_TOKENS, request.min_tokens or 0))


def _check_scores(request: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
    """Raises `InvalidValue` for a request whose answer would have more than `MAX_SCORES`."""
    if request.num_prompt_logprobs is None:
        return
    tokens, each = sum(map(len, prompts)) * (request.n or 1), 1 + request.num_prompt_logprobs
    if tokens * each > MAX_SCORES:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidValue(
            f"{tokens} tokens of prompts with {each} log probabilities each are {tokens * each}; the limit of a "
            f"request is {MAX_SCORES}",
            param=param,
        )
