"""Personas of Masquerade as adapters of vLLM; vLLM calls `register` when it starts."""

from vllm_masquerade.plugin import register
from vllm_masquerade.reference import Reference, make_request

__all__ = ["Reference", "make_request", "register"]
