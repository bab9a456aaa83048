"""Every error that the server raises, with the HTTP status, type and code that clients get for it.

The arguments of a class are its row in that table; a class inherits what it does not state. `http/errors.py` renders
the errors. Mask files have errors of their own, in `maskstore.errors`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

GIVEN = 80  # most characters of a client's value that a message repeats

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = GIVEN
_shorten.maxlist = _shorten.maxdict = _shorten.maxlevel = 2


def quote(value: object) -> str:
    """The representation of a value for a message, cut to `GIVEN` characters."""
    text = _shorten.repr(value)
    return text if len(text) <= GIVEN else f"{text[: GIVEN - 3]}..."


class ErrorRow(TypedDict, total=False):
    """What a class of errors states about itself."""

    status: int
    type: str
    code: str
    retry: bool | None


class MasqueradeError(Exception):
    """Base of all. `param` names the request field at fault, if there is one."""

    status = 500
    type = "server_error"
    code = "internal_error"
    retry: bool | None = None  # whether a retry may help; None where the status says so

    def __init_subclass__(cls, **row: Unpack[ErrorRow]) -> None:
        for name, value in row.items():
            setattr(cls, name, value)

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequest(MasqueradeError, status=400, type="invalid_request_error", code="invalid_request"):
    """The request cannot be fulfilled as it stands."""


class InvalidValue(BadRequest, code="invalid_value"):
    """A parameter is malformed or out of range."""


class UnsupportedParameter(BadRequest, code="unsupported_parameter"):
    """A parameter would change the answer and is not implemented."""


class PersonaConflict(BadRequest, code="persona_conflict"):
    """A request names two different personas."""


class PersonaExists(BadRequest, code="persona_exists"):
    """The name is taken."""


class InvalidMask(BadRequest, code="invalid_mask"):
    """An imported file is not a mask, is incomplete, is for another base, or is not signed by a trusted key."""


class MaskTooLarge(BadRequest, code="mask_too_large"):
    """A mask is larger than the memory for all masks, so waiting does not help."""


class QuotaExceeded(BadRequest, code="quota_exceeded"):
    """An owner has reached a quota. Waiting does not help, so this is not a rate limit."""


class StateConflict(BadRequest, code="state_conflict"):
    """The state of a job or file does not allow this."""


class ContextTooLong(BadRequest, code="context_length_exceeded"):
    """Prompt and answer do not fit the model's context or the KV cache.

    `tokens` is the known lower bound of the prompts' tokens: the key is charged for them.
    """

    def __init__(self, message: str, *, param: str | None = None, tokens: int = 0) -> None:
        super().__init__(message, param=param)
        self.tokens = tokens


class MethodNotAllowed(BadRequest, status=405, code="method_not_allowed"):
    """The route exists, with another method."""


class TimedOut(BadRequest, status=408, code="request_timeout"):
    """The request arrives too slowly."""


class TooLarge(BadRequest, status=413, code="body_too_large"):
    """The body has too many bytes."""


class RangeNotSatisfiable(BadRequest, status=416, code="range_not_satisfiable"):
    """The file ends before the range begins."""


class HeadersTooLarge(BadRequest, status=431, code="headers_too_large"):
    """The request has too many headers, or too long ones."""


class InvalidKey(MasqueradeError, status=401, type="authentication_error", code="invalid_api_key"):
    """The API key is missing, unknown, revoked or expired."""


class Forbidden(MasqueradeError, status=403, type="permission_error", code="forbidden"):
    """The caller has no right to this."""


class ScopeMissing(Forbidden, code="scope_missing"):
    """The key does not have the scope that the route needs."""


class PersonaForbidden(Forbidden, code="persona_forbidden"):
    """The name is not on the key's list of personas, whether or not the persona exists."""


class OriginForbidden(Forbidden, code="origin_forbidden"):
    """A browser sent this for a page of another origin."""


class NotFound(MasqueradeError, status=404, type="not_found_error", code="not_found"):
    """Something named does not exist."""


class ModelNotFound(NotFound, code="model_not_found"):
    """The server has no such model."""


class PersonaNotFound(NotFound, code="persona_not_found"):
    """The served base has no such persona."""


class UploadNotFound(NotFound, code="file_not_found"):
    """The key has no such file."""


class JobNotFound(NotFound, code="job_not_found"):
    """The key has no such job."""


class ResponseNotFound(NotFound, code="response_not_found"):
    """The key has no such response, or has none any more."""


class BatchNotFound(NotFound, code="batch_not_found"):
    """The key has no such batch."""


class KeyNotFound(NotFound, code="key_not_found"):
    """The store has no such key."""


class RevisionConflict(MasqueradeError, status=412, type="conflict_error", code="generation_conflict"):
    """The current revision is not the expected one: another change came first."""


class PersonaDamaged(MasqueradeError, code="persona_damaged", retry=False):
    """A persona's mask cannot be read, or fails verification."""


class Overloaded(MasqueradeError, status=429, type="rate_limit_error", code="queue_full"):
    """The queue is full; `retry_after` is in whole seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Overloaded, code="rate_limited"):
    """The key has used up its minute of `kind`: `requests` or `tokens`."""

    def __init__(self, message: str, kind: str, *, retry_after: int) -> None:
        super().__init__(message, retry_after=retry_after)
        self.kind = kind


class NotReady(MasqueradeError, status=503, code="not_ready"):
    """The engine is starting, stopping or out of service; `retry_after` is in whole seconds."""

    retry_after = 5


class WorkedElsewhere(NotReady, retry=False):
    """Another server runs the jobs of this store; this one never will."""


class LeaseLost(NotReady):
    """Another server has taken up the job or batch of this one, which did not renew its lease in time."""


class AnswerTimedOut(MasqueradeError, status=504, code="answer_timeout", retry=False):
    """The answer took longer than a request may take."""


class StorageFull(MasqueradeError, status=507, code="storage_full", retry=False):
    """The disk, or a limit on files, has no room for the upload. Nothing of it is kept."""


class StepFailed(MasqueradeError, code="step_failed"):
    """The forward pass failed for this request's batch."""


class CannotListen(MasqueradeError, code="cannot_listen"):
    """The address is in use, or belongs to another machine."""


class UnusableStore(MasqueradeError, code="unusable_store"):
    """A store's folder or one of its tables cannot be read or written."""


class StoreTooNew(UnusableStore):
    """A table has the schema `found`, which is newer than the newest `known` one."""

    def __init__(self, path: object, found: int, known: int) -> None:
        super().__init__(
            f"{path} was written by a newer version of Masquerade (schema {found}; this one knows up to {known}); "
            "start that version again, or restore the backup from before the upgrade"
        )


class DatabaseUnreachable(MasqueradeError, code="database_unreachable"):
    """The database of `--database` cannot be used when the server or a command starts."""


class UnusableModel(MasqueradeError, code="unusable_model"):
    """A base model cannot be loaded, or masks cannot be applied to it."""


class BuildFailed(MasqueradeError, code="build_failed"):
    """A persona cannot be built. `result` is what its job made all the same."""

    def __init__(self, message: str, *, param: str | None = None, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, param=param)
        self.result = result


class BadDataset(BuildFailed, status=400, type="invalid_request_error", code="bad_dataset"):
    """A JSONL file is wrong; the message names the file and the line."""


class BuildUnsaved(BuildFailed, status=507, code="build_unsaved", retry=False):
    """What a build found cannot be written: a full disk. What it wrote before stays, and the same build goes on from
    there.
    """


class BuildRunning(BuildFailed):
    """Another process works on the same build."""


class MaskRefused(BuildFailed, code="mask_refused"):
    """A new mask has no effect, or harms the model, and is not published; its opposite may be."""
