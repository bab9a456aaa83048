"""Continuous batching over the unmodified transformers forward: requests go in, tokens come out as events."""

from masquerade.engine.embedding import Embedding, Pooling, Vector
from masquerade.engine.engine import Engine, EngineConfig
from masquerade.engine.prefix import BLOCK_SIZE
from masquerade.engine.request import (
    INT64,
    MAX_LOGPROBS,
    Event,
    Finished,
    Grammar,
    Phase,
    PromptToken,
    Request,
    SamplingParams,
    ScoredPrompt,
    Token,
)
from masquerade.engine.structured import AnswerFormat, JsonFormat
from masquerade.engine.text import AnswerText, Detokenizer, token_bytes

__all__ = [
    "BLOCK_SIZE",
    "INT64",
    "MAX_LOGPROBS",
    "AnswerFormat",
    "AnswerText",
    "Detokenizer",
    "Embedding",
    "Engine",
    "EngineConfig",
    "Event",
    "Finished",
    "Grammar",
    "JsonFormat",
    "Phase",
    "Pooling",
    "PromptToken",
    "Request",
    "SamplingParams",
    "ScoredPrompt",
    "Token",
    "Vector",
    "token_bytes",
]
