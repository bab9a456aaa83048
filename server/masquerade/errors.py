"""Everything that can go wrong in the server, as one tree.

Knows the HTTP status, OpenAI type and code of each failure; these are the only HTTP numbers outside `api`. Refuses to
know how a failure is rendered. Faults of mask files have a tree of their own in `maskstore`.

    MasqueradeError
    ├── BadRequest                what was asked cannot be done as asked
    │   ├── InvalidValue          a parameter is malformed or out of range
    │   ├── UnsupportedParameter  a parameter would change the answer and is not implemented
    │   ├── PersonaExists         the name is taken
    │   ├── InvalidMask           an imported file is no mask that can be worn here
    │   ├── PersonaConflict       two sources name two personas
    │   ├── ContextTooLong        prompt and answer do not fit the context or the cache
    │   ├── TooLarge              more bytes than are accepted
    │   ├── HeadersTooLarge       more headers than are accepted
    │   ├── MaskTooLarge          a persona's mask is larger than all the room there is for masks
    │   ├── QuotaExceeded         an owner has as much as it may have
    │   └── StateConflict         a job or a file is in a state in which this cannot be done
    ├── InvalidKey                no key, an unknown one, or one that was revoked or has expired
    ├── Forbidden                 what was asked is not for this caller
    │   ├── ScopeMissing          the key has not the scope
    │   ├── PersonaForbidden      the key's list of personas has not the name
    │   └── OriginForbidden       a browser asks on behalf of a page from elsewhere
    ├── NotFound
    │   ├── ModelNotFound         no such model is served
    │   ├── PersonaNotFound       no such persona of the served base
    │   ├── UploadNotFound        the key has no such file
    │   ├── JobNotFound           the key has no such job
    │   └── KeyNotFound           the store has no such key
    ├── GenerationConflict        what was expected to be current is not: somebody was faster
    ├── PersonaDamaged            a persona's mask cannot be read or does not verify
    ├── Overloaded                the queue is full; try again later
    │   └── RateLimited           the key has used up its minute
    ├── TimedOut                  nothing of the body arrives any more
    ├── AnswerTimedOut            the answer was not finished in time
    ├── NotReady                  starting, stopping or out of service
    │   └── WorkedElsewhere       another server works the jobs of this store
    ├── StorageFull               the disk, or a limit on files, leaves no room for what was sent
    ├── StepFailed                the forward pass failed for this request's batch
    ├── CannotListen              the address is taken or not this machine's
    ├── UnusableStore             a store cannot be read or written
    │   └── StoreTooNew           a newer version has written it
    ├── UnusableModel             a base model cannot be loaded or cannot wear masks
    └── BuildFailed               a persona cannot be built
        ├── BadDataset            a JSONL file is wrong; names file and line
        └── MaskRefused           a mask was found, and does nothing or ruins the model
"""

from __future__ import annotations

import reprlib

GIVEN = 80  # characters of what was given that a message repeats

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = GIVEN
_shorten.maxlist = _shorten.maxdict = _shorten.maxlevel = 2


def quote(value: object) -> str:
    """What was given, for a message: its representation, cut to `GIVEN` characters."""
    text = _shorten.repr(value)
    return text if len(text) <= GIVEN else f"{text[: GIVEN - 3]}..."


class MasqueradeError(Exception):
    """Base of the tree. `param` names the request field at fault, where there is one."""

    status = 500
    type = "server_error"
    code = "internal_error"
    retry: bool | None = None  # whether it helps to ask again, where the status would tell clients otherwise

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequest(MasqueradeError):
    """What was asked cannot be done as asked."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidValue(BadRequest):
    """A parameter is malformed or out of range."""

    code = "invalid_value"


class UnsupportedParameter(BadRequest):
    """A parameter would change the answer and is not implemented."""

    code = "unsupported_parameter"


class PersonaConflict(BadRequest):
    """Two sources of a request name two different personas."""

    code = "persona_conflict"


class ContextTooLong(BadRequest):
    """Prompt and answer do not fit the model's context or the key-value cache.

    `tokens` is how many the prompts have, or are known to have at least: they are charged although they are refused.
    """

    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = None, tokens: int = 0) -> None:
        super().__init__(message, param=param)
        self.tokens = tokens


class InvalidKey(MasqueradeError):
    """No key was given, or one that opens nothing (any more)."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(MasqueradeError):
    """What was asked is not for this caller."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class ScopeMissing(Forbidden):
    """The key has not the scope that the route needs."""

    code = "scope_missing"


class PersonaForbidden(Forbidden):
    """The key's list of personas has not this name, whether or not there is such a persona."""

    code = "persona_forbidden"


class OriginForbidden(Forbidden):
    """A browser asks on behalf of a page that is not this server's."""

    code = "origin_forbidden"


class NotFound(MasqueradeError):
    """Something named does not exist."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No such model is served."""

    code = "model_not_found"


class PersonaNotFound(NotFound):
    """The served base has no such persona."""

    code = "persona_not_found"


class UploadNotFound(NotFound):
    """The key has no such file."""

    code = "file_not_found"


class JobNotFound(NotFound):
    """The key has no such job."""

    code = "job_not_found"


class KeyNotFound(NotFound):
    """The store has no such key."""

    code = "key_not_found"


class TooLarge(BadRequest):
    """More bytes than are accepted."""

    status = 413
    code = "body_too_large"


class MaskTooLarge(BadRequest):
    """A persona's mask is larger than all the room that the server has for masks, so waiting does not help."""

    code = "mask_too_large"


class HeadersTooLarge(BadRequest):
    """More headers, or longer ones, than are accepted."""

    status = 431
    code = "headers_too_large"


class QuotaExceeded(BadRequest):
    """An owner has as much as it may have; waiting does not help, so this is not a rate limit."""

    code = "quota_exceeded"


class StateConflict(BadRequest):
    """A job or file is in a state in which this cannot be done to it."""

    code = "state_conflict"


class RevisionConflict(MasqueradeError):
    """What was expected to be current is not: somebody was faster."""

    status = 412
    type = "conflict_error"
    code = "generation_conflict"


class PersonaExists(BadRequest):
    """The name is taken."""

    code = "persona_exists"


class InvalidMask(BadRequest):
    """An imported file is no mask, not whole, for another base, or not signed by a trusted key."""

    code = "invalid_mask"


class PersonaDamaged(MasqueradeError):
    """A persona's mask cannot be read, or does not verify."""

    code = "persona_damaged"
    retry = False


class Overloaded(MasqueradeError):
    """The queue is full; `retry_after` is in whole seconds."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Overloaded):
    """The key has used up its minute of `kind`: `requests` or `tokens`."""

    code = "rate_limited"

    def __init__(self, message: str, kind: str, *, retry_after: int) -> None:
        super().__init__(message, retry_after=retry_after)
        self.kind = kind


class TimedOut(BadRequest):
    """Nothing of the body arrives any more."""

    status = 408
    code = "request_timeout"


class AnswerTimedOut(MasqueradeError):
    """The answer was not finished within the time that a request may take."""

    status = 504
    code = "answer_timeout"
    retry = False


class NotReady(MasqueradeError):
    """The engine is starting, stopping or out of service; `retry_after` is in whole seconds."""

    status = 503
    code = "not_ready"
    retry_after = 5


class WorkedElsewhere(NotReady):
    """Another server works the jobs of this store; this one never will."""

    retry = False


class StorageFull(MasqueradeError):
    """The disk, or a limit on files, leaves no room for what was sent. Nothing of it is kept."""

    status = 507
    code = "storage_full"
    retry = False


class StepFailed(MasqueradeError):
    """The forward pass failed for the batch that this request was in."""

    code = "step_failed"


class CannotListen(MasqueradeError):
    """The address is taken, or not this machine's."""

    code = "cannot_listen"


class UnusableStore(MasqueradeError):
    """A store's folder or one of its tables cannot be read or written."""

    code = "unusable_store"


class StoreTooNew(UnusableStore):
    """A table of a store has a schema `found` that is newer than the newest that is `known` here."""

    def __init__(self, path: object, found: int, known: int) -> None:
        super().__init__(
            f"{path} was written by a newer version of Masquerade (schema {found}; this one knows up to {known}); "
            "start that version again, or restore the backup from before the upgrade"
        )


class UnusableModel(MasqueradeError):
    """A base model cannot be loaded or cannot wear masks."""

    code = "unusable_model"


class BuildFailed(MasqueradeError):
    """A persona cannot be built."""

    code = "build_failed"


class BadDataset(BuildFailed):
    """A JSONL file is wrong; the message names the file and the line."""

    status = 400
    type = "invalid_request_error"
    code = "bad_dataset"


class MaskRefused(BuildFailed):
    """A mask was found, but its certificate says that it does nothing, or that it ruins the model."""

    code = "mask_refused"
