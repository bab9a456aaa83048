"""Tokens for many requests at once: a compact continuous-batching engine over the unmodified transformers forward.

Knows requests, steps and key-value pages. Refuses to know HTTP, names of personas and text formats of clients.
"""

from masquerade.engine.engine import Engine, EngineConfig
from masquerade.engine.request import MOST_LOGPROBS, Event, Finished, Grammar, Phase, Request, SamplingParams, Token
from masquerade.engine.structured import AnswerFormat, JsonFormat
from masquerade.engine.text import AnswerText, Detokenizer, spell

__all__ = [
    "MOST_LOGPROBS",
    "AnswerFormat",
    "AnswerText",
    "Detokenizer",
    "Engine",
    "EngineConfig",
    "Event",
    "Finished",
    "Grammar",
    "JsonFormat",
    "Phase",
    "Request",
    "SamplingParams",
    "Token",
    "spell",
]
