"""The body of `POST /v1/batches`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from masquerade.http.errors import ANTHROPIC
from masquerade.http.wire import RequestBody, Text, show
from masquerade.openai import unsupported
from masquerade.openai.schemas import Metadata

_BATCH: dict[str, Any] = {
    "input_file_id": "file-6ab1f0c2d3e4f5061728394a",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}
_Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]


def _refuse_messages(value: Any) -> Any:
    """Refuse Anthropic's route by name: its batches have another form, of requests and of results."""
    if value == ANTHROPIC:
        raise ValueError(
            f"batches have OpenAI's form and no requests for {ANTHROPIC}; write the lines for /v1/chat/completions"
        )
    return value


class BatchRequest(RequestBody):
    """`POST /v1/batches`. The file has been uploaded with the purpose `batch`."""

    model_config = show(_BATCH)
    refused = unsupported.BATCH

    input_file_id: Text
    endpoint: Annotated[_Endpoint, BeforeValidator(_refuse_messages)]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
