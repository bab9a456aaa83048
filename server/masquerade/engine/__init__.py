"""Tokens for many requests at once: a compact continuous-batching engine over the unmodified transformers forward.

Knows requests, steps and key-value pages. Refuses to know HTTP, names of personas and text formats of clients.
"""

from masquerade.engine.engine import Engine, EngineConfig
from masquerade.engine.request import MOST_LOGPROBS, Event, Finished, Grammar, Phase, Request, Sampling, Token
from masquerade.engine.structured import Form, Frame
from masquerade.engine.text import Detokenizer, Text, spell

__all__ = [
    "MOST_LOGPROBS",
    "Detokenizer",
    "Engine",
    "EngineConfig",
    "Event",
    "Finished",
    "Form",
    "Frame",
    "Grammar",
    "Phase",
    "Request",
    "Sampling",
    "Text",
    "Token",
    "spell",
]
