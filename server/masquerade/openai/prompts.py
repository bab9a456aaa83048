"""From what a request says to the token ids of its prompts, off the event loop and within the room there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from masquerade.http.access import Caller
from masquerade.model import Room, check_bytes, encode, render_chat, too_long
from masquerade.openai.schemas import Message, Tool
from masquerade.service.serving import Serving

T = TypeVar("T")
SHORT = 2048  # bytes of a body whose texts are tokenised at once: handing them over would take as long
LEAST_ROOM = 2**16  # tokens that are counted for whoever asks, however short the context is
PROMPTS_ROOM = 4  # times as many in all prompts of a request

CONTEXT = "This model's maximum context length is {} tokens."


def context_room(serving: Serving) -> Room:
    """The model's context, in OpenAI's words."""
    return Room(serving.base.context, CONTEXT.format(serving.base.context))


def counting_room(serving: Serving) -> Room:
    """What is tokenised only to be looked at: the context, and at least `LEAST_ROOM`."""
    most = max(serving.base.context, LEAST_ROOM)
    return Room(most, f"A text of up to {most} tokens is tokenised.")


async def tokenise_chat(
    serving: Serving, caller: Caller, size: int, messages: Sequence[Message], tools: Sequence[Tool] | None, room: Room
) -> list[int]:
    """Token ids of a chat out of a body of `size` bytes.

    Raises `ContextTooLong` for a chat that is far longer than the room, by the bytes of its messages before anything
    else, and `Overloaded` if too much waits to be tokenised.
    """
    tokenizer = serving.base.tokenizer
    check_bytes(tokenizer, (text for message in messages for text in message.texts()), room, "messages")

    def render() -> list[int]:
        plain = [message.plain() for message in messages]
        offered = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        return render_chat(tokenizer, plain, offered, room)

    return await work(serving, caller, size, render)


async def tokenise_texts(
    serving: Serving,
    caller: Caller,
    size: int,
    prompts: Sequence[str | list[int]],
    room: Room,
    *,
    special: bool = True,
) -> list[list[int]]:
    """Token ids of prompts out of a body of `size` bytes, `special` with what the tokenizer puts before every text.

    Raises `ContextTooLong` as `tokenise_chat` does, for one prompt or for all of them together.
    """
    tokenizer = serving.base.tokenizer
    total = PROMPTS_ROOM * max(room.tokens, LEAST_ROOM)
    for prompt in prompts:
        if isinstance(prompt, str):
            check_bytes(tokenizer, [prompt], room, "prompt")
        elif len(prompt) > room.tokens:
            raise too_long(room, f"the prompt has {len(prompt)} tokens", "prompt", len(prompt))

    def encode_all() -> list[list[int]]:
        found, tokens = [], 0
        for prompt in prompts:
            ids = prompt if isinstance(prompt, list) else encode(tokenizer, prompt, room, "prompt", special=special)
            found.append(ids)
            tokens += len(ids)
            if tokens > total:
                together = Room(total, f"The prompts of a request may have {total} tokens together.")
                raise too_long(together, f"the first {len(found)} of {len(prompts)} have {tokens}", "prompt", tokens)
        return found

    return await work(serving, caller, size, encode_all)


async def work(serving: Serving, caller: Caller, size: int, job: Callable[[], T]) -> T:
    """The outcome of a job on the texts of a body: of a small one at once, of others when it is the caller's turn."""
    return job() if size <= SHORT else await serving.workers.run(caller.owner, size, partial(job))
