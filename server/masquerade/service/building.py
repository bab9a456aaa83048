"""Builds as jobs: turns a job's spec into a builder, in steps for the job runner, and publishes the masks.

A build runs on the served base and does not change it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from maskstore import ANY, BucketUnreachable, Mask, MaskConflict, MaskExists, MaskNotFound, Registry, StoreBusy
from maskstore import sweep as clear_masks
from masquerade.errors import (
    BadDataset,
    BuildFailed,
    BuildUnsaved,
    Forbidden,
    InvalidKey,
    InvalidValue,
    MaskRefused,
    MasqueradeError,
    NotReady,
    PersonaExists,
    QuotaExceeded,
    StateConflict,
)
from masquerade.evaluate.dataset import Example, Polarity, holds_both_sides, read_examples, read_questions
from masquerade.evaluate.recall import VERSIONS
from masquerade.evaluate.splits import check_contrast
from masquerade.jobs import ID, Cancelled, Job, JobService
from masquerade.jobs.runner import Work
from masquerade.keys.ring import Keyring
from masquerade.model import Base, MaskManager, trim_heap
from masquerade.plan.memory import format_bytes
from masquerade.pruning import Builder, BuildResult, PersonaExamples, Progress, Recipe, Scratch
from masquerade.pruning.cards import read_card
from masquerade.pruning.executor import Executor
from masquerade.pruning.prompts import CalibrationPrompts, add_generated, sample_questions
from masquerade.pruning.scores import SCORES
from masquerade.pruning.sharding import Sharding
from masquerade.service import kept_builds
from masquerade.service.rights import Rights, find_rights
from masquerade.service.serving import Serving

_log = logging.getLogger(__name__)
T = TypeVar("T")
KEPT_HOURS = 24.0  # for which the work of a refused or unsaved build is kept
KEPT_BUILDS = 4  # most ended builds whose work is kept, one of each owner


@dataclass(frozen=True)
class JobNames:
    """The personas that a job publishes: one, and its opposite if the request has one."""

    persona: str
    opposite: str | None

    @classmethod
    def of(cls, job_id: str, spec: Mapping[str, Any]) -> JobNames:
        """The names of a spec; a persona without one gets its job's id."""
        return cls(spec["persona"] or f"persona-{job_id.removeprefix(ID)[:6]}", spec["opposite"])

    def fields(self) -> Iterator[tuple[str, str]]:
        """Each name, and the field of the job's request that gives it."""
        yield self.persona, "suffix"
        if self.opposite is not None:
            yield self.opposite, "method.mask.contrast_name"


@dataclass(frozen=True)
class BuildInput:
    """The input of a build."""

    own: PersonaExamples
    contrast: PersonaExamples | None
    neutral: Sequence[Example]
    script: CalibrationPrompts | None = None  # for answers that the base has yet to generate
    ignored: Sequence[str] = ()  # unused fields of a character card


def build(serving: Serving, keyring: Keyring, job_service: JobService, job: Job) -> Work:
    """The work of a job. Reads its files first; raises their errors, and errors of its owner's rights."""
    check_base(serving.base)
    sweep(serving, job_service)
    _check_owner(serving, keyring, job)
    base = job.spec["base"]
    if base["fingerprint"] != serving.base.fingerprint:
        raise BuildFailed(
            f"the job is for the base {base['name']!r} ({base['fingerprint'][:8]}); the server now serves "
            f"{serving.base.name!r} ({serving.base.fingerprint[:8]})"
        )
    build_input = read_input(job_service, job.spec, JobNames.of(job.id, job.spec))
    if build_input.ignored:
        unused = ", ".join(build_input.ignored)
        job_service.table.add_event(job.id, "warn", f"of the character card, {unused} are ignored")
    return _work(serving, keyring, job_service, job, build_input)


def check_base(base: Base) -> None:
    """Raise `StateConflict` if this server cannot build from its base."""
    if len(base.devices) > 1:
        raise StateConflict(
            f"the layers of this server's base are divided among {len(base.devices)} devices (--split-layers), and a "
            "build needs them on one; run `masquerade build`, or build on another server"
        )


def check_rights(rights: Rights, registry: Registry, names: JobNames, *, replace: bool) -> None:
    """Raises `ScopeMissing` and `PersonaForbidden` unless a job may publish its personas.

    Routes call this when they queue a job. The owner's rights are checked again before the build and before publishing.
    Replacing a persona is managing it, which needs the scope `admin`.
    """
    rights.check_scope("build")
    if replace:
        rights.check_scope("admin", "to replace a persona", "method.mask.replace")
    aliases = registry.aliases()
    for name, param in names.fields():
        rights.check_managed(name, aliases, param)


def check(job_service: JobService, spec: Mapping[str, Any], names: JobNames) -> None:
    """Check the files and the recipe of a spec before the job is queued.

    Raises `BadDataset`, which names the lines, and `InvalidValue` for a contradictory recipe. Both name the field of
    the request.
    """
    build_input = read_input(job_service, spec, names)
    recipe = _recipe(spec)
    with _about("method.mask."):
        recipe.plan(contrast=build_input.contrast is not None)
    if build_input.script is not None:
        return
    if build_input.contrast is None:
        _check_without_contrast(spec)
        return
    with _about("method.mask.contrast_file"):
        check_contrast(build_input.own.examples, build_input.contrast.examples)


def _check_without_contrast(spec: Mapping[str, Any]) -> None:
    """Raise for fields that need a contrast."""
    needing = {"contrast_name": spec["opposite"], "contrast_validation_file": spec["files"].get("contrast_validation")}
    for param, value in needing.items():
        if value is not None:
            raise InvalidValue(
                f"{param} needs a contrast_file, or a training file whose lines have both sides",
                param=f"method.mask.{param}",
            )
    score = _recipe(spec).plan(contrast=False).score
    if SCORES[score].contrastive:
        raise InvalidValue(
            f"the score {score!r} compares two personas; give contrast_file too", param="method.mask.score"
        )


def read_input(job_service: JobService, spec: Mapping[str, Any], names: JobNames) -> BuildInput:
    """Read the files of a spec."""

    def read(role: str, side: Polarity = "own") -> list[Example]:
        return _read(job_service, spec, role, partial(read_examples, side=side)) or []

    def read_opposite(own_role: str, role: str) -> list[Example] | None:
        """From its own file, or from the persona's if its lines have both sides."""
        if role not in spec["files"] and _read(job_service, spec, own_role, holds_both_sides):
            role = own_role
        return read(role, "contrast") if role in spec["files"] else None

    recipe = _recipe(spec)
    held_contrast = read_opposite("validation", "contrast_validation") or []
    neutral = read("neutral")
    own = partial(PersonaExamples, names.persona, validation=read("validation"))
    other = partial(PersonaExamples, names.opposite or "", validation=held_contrast)
    if spec["prompt"] is None:
        examples, answers = read("training"), read_opposite("training", "contrast")
        return BuildInput(own(examples), None if answers is None else other(answers), neutral)
    card = _read(job_service, spec, "card", read_card)
    questions = _read(job_service, spec, "training", read_questions) or []
    sampled = sample_questions(questions, recipe.samples, recipe.seed)
    system = card.system if card else spec["prompt"]["system"]
    script = CalibrationPrompts(system, sampled, spec["prompt"]["contrast"], seed=recipe.seed)
    return BuildInput(own(card.examples if card else ()), other(()), neutral, script, card.ignored if card else ())


def sweep(serving: Serving, job_service: JobService) -> None:
    """Delete the remains of finished jobs and killed writers.

    Unfinished jobs keep their scratch to continue. So does each owner's last job of which a mask was refused or that
    had no room, of the last `KEPT_BUILDS` of them for `KEPT_HOURS`, for a request that goes on from there.
    """
    with suppress(StoreBusy):
        clear_masks(serving.store.root)
    last: dict[str, Job] = {}
    for job in _stopped_jobs(job_service):
        last.setdefault(job.owner, job)
    jobs = *job_service.table.open_jobs(), *list(last.values())[:KEPT_BUILDS]
    kept = {_folder(serving, job.owner, job.spec) for job in jobs}
    for folder in (serving.store.root / kept_builds.FOLDER).glob("job-*"):
        if folder not in kept:
            with suppress(OSError):  # it is tried again before the next job
                kept_builds.delete(folder)


def find_published(job_service: JobService, owner: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the personas that a job of the same build has published although it failed, by name."""
    work = _identify(owner, spec)
    same = [job for job in _stopped_jobs(job_service) if _identify(job.owner, job.spec) == work]
    return {made["persona"]: made["digest"] for job in same[::-1] for made in (job.result or {}).get("personas", [])}


def _stopped_jobs(job_service: JobService) -> list[Job]:
    """The ended jobs whose work may be kept, the newest first."""
    codes = MaskRefused.code, BuildUnsaved.code
    return job_service.table.failed_jobs(codes, time.time() - KEPT_HOURS * 3600)


def _work(serving: Serving, keyring: Keyring, job_service: JobService, job: Job, build_input: BuildInput) -> Work:
    """Build and publish. The first work item uses no model; `model_next` of each one says whether the next does."""
    folder = _folder(serving, job.owner, job.spec)
    scratch = Scratch(folder)
    try:
        found = yield from find_masks(serving.base, serving.manager, _recipe(job.spec), build_input, scratch)
    except BuildUnsaved as error:
        raise BuildUnsaved(f"{error}{_invite(folder)}") from error
    except (Exception, Cancelled):  # not GeneratorExit: a stopping server keeps the scratch
        scratch.release()
        with suppress(OSError):
            kept_builds.delete(folder)
        raise
    finally:
        scratch.release()
        trim_heap()
    return partial(_finish, serving, keyring, job_service, job, found)


def find_masks(
    base: Base,
    manager: MaskManager,
    recipe: Recipe,
    build_input: BuildInput,
    scratch: Scratch,
    executor: Executor | None = None,
    sharding: Sharding | None = None,
) -> Generator[Progress, None, BuildResult]:
    """Let the base write what a script requires, then find the masks; resumes from `scratch`."""
    own, contrast = build_input.own, build_input.contrast
    if build_input.script is not None and contrast is not None:
        own, contrast = yield from add_generated(base, build_input.script, own, contrast, scratch)
    builder = Builder(base, manager, recipe, own, contrast, build_input.neutral, scratch, executor, sharding)
    return (yield from builder.run())


def _check_owner(serving: Serving, keyring: Keyring, job: Job) -> None:
    """Raise if the owner's key has been revoked or restricted since the job was queued."""
    try:
        rights = find_rights(job.owner, keyring)
        check_rights(rights, serving.registry, JobNames.of(job.id, job.spec), replace=job.spec["replace"])
    except (InvalidKey, Forbidden) as error:
        raise type(error)(
            f"nothing was published, because the key of this job no longer permits it: {error}", param=error.param
        ) from error


def _finish(
    serving: Serving, keyring: Keyring, job_service: JobService, job: Job, found: BuildResult
) -> dict[str, Any]:
    """Publish the masks, and return the job's result. Raises `MaskRefused` with it if a mask is refused, `NotReady` if
    the registry is busy or its bucket is out of reach, and `BuildUnsaved` if the disk is full: what was found stays.
    """
    folder = _folder(serving, job.owner, job.spec)
    try:
        _check_owner(serving, keyring, job)
        result = _publish(serving, job_service, job, found.masks)
    except (StoreBusy, BucketUnreachable) as error:
        raise NotReady(f"the masks cannot be published now: {error.message}") from error
    except BuildUnsaved as error:
        raise BuildUnsaved(f"{error}{_invite(folder)}") from error
    except Exception:
        with suppress(OSError):
            kept_builds.delete(folder)
        raise
    result["refused"] = [asdict(one) for one in found.refused]
    if not found.refused:
        with suppress(OSError):
            kept_builds.delete(folder)
    else:
        forced = _explain_kept("the same request with `force`", folder)
        raise MaskRefused(f"{found.explain()}; or force it: {forced}", result=result)
    return result


def _invite(folder: Path) -> str:
    """How to go on with an unsaved build, in words that continue its error; nothing if nothing of it is kept."""
    request = "the same request, with another Idempotency-Key if it had one,"
    return f"; {_explain_kept(request, folder)}" if kept_builds.measure(folder).nbytes else ""


def _explain_kept(request: str, folder: Path) -> str:
    size = format_bytes(kept_builds.measure(folder).nbytes)
    return f"within {KEPT_HOURS:g} hours {request} goes on from what is kept of this build ({size})"


def _publish(serving: Serving, job_service: JobService, job: Job, masks: Sequence[Mask]) -> dict[str, Any]:
    known = find_published(job_service, job.owner, job.spec)
    new = [mask for mask in masks if not _is_published(serving.registry, mask, known)]
    published = []
    try:
        serving.registry.publish_built(*new, expected=ANY if job.spec["replace"] else None)
    except (MaskConflict, MaskExists) as error:
        raise PersonaExists(f"a name was taken during the build: {error.message}") from error
    except OSError as error:
        raise BuildUnsaved(f"the masks were found but cannot be written: {error.strerror}") from error
    for mask in masks:
        name, certificate = mask.info.persona, dict(mask.info.certificate)
        file = _keep_file(job_service, job, name, serving.store.path(mask.digest), mask.digest)
        published.append({"persona": name, "digest": mask.digest, "certificate": certificate, "file": file})
    tokens = None
    for mask in masks[:1]:
        calibration = dict(mask.info.calibration)
        tokens = calibration["tokens"] + (calibration["contrast"] or {}).get("tokens", 0)
    return {"personas": published, "trained_tokens": tokens}


def _keep_file(job_service: JobService, job: Job, name: str, path: Path, digest: str) -> str | None:
    """The id of a published mask as a file of the job, or None: the persona is served, whatever becomes of the file."""
    try:
        return job_service.uploads.adopt(job.owner, f"{name}.safetensors", path, digest).id
    except Exception:
        _log.exception("the persona %s is published, but the job %s cannot keep its file", name, job.id)
        return None


def _is_published(registry: Registry, mask: Mask, known: Mapping[str, str]) -> bool:
    """Whether an earlier job of the same build published a mask, and it is still current; `known` has the digests."""
    name = mask.info.persona
    with suppress(MaskNotFound):
        return known.get(name) == mask.digest == registry.resolve(name).digest
    return False


def _recipe(spec: Mapping[str, Any]) -> Recipe:
    with _about("method.mask."):
        return Recipe(**spec["recipe"])


def _folder(serving: Serving, owner: str, spec: Mapping[str, Any]) -> Path:
    """Where the work of a build is kept; what was found on other forms of the weights is not of use."""
    base = serving.base
    weights = base.device.type, str(base.dtype).removeprefix("torch."), base.quantization
    name = "-".join(filter(None, ("job", _identify(owner, spec), *weights)))
    return serving.store.root / kept_builds.FOLDER / name


def _identify(owner: str, spec: Mapping[str, Any]) -> str:
    """A name that is equal for an owner's equal builds, forced or not, so that one can go on from the other."""
    recipe = {field: value for field, value in spec["recipe"].items() if field != "force"}
    fields = ("base", "persona", "opposite", "prompt", "files")
    work = VERSIONS, owner, recipe, {field: spec[field] for field in fields}
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:16]


def _read(job_service: JobService, spec: Mapping[str, Any], role: str, read: Callable[[Path], T]) -> T | None:
    """The content of the file of a role, or None without one. Errors have the upload's name instead of its path."""
    file_id = spec["files"].get(role)
    if file_id is None:
        return None
    path, param = job_service.uploads.path(file_id), field_of(role)
    try:
        content = read(path)
    except BadDataset as error:
        named = f"{job_service.table.name_file(file_id)} ({file_id})"
        raise BadDataset(str(error).replace(str(path), named), param=param) from error
    limit = job_service.table.quotas.rows
    if isinstance(content, list) and len(content) > limit:
        raise QuotaExceeded(f"{file_id} has {len(content)} examples; the limit is {limit}", param=param)
    return content


@contextmanager
def _about(param: str) -> Iterator[None]:
    """Set the field of errors in the block to `param`, or put `param` before it if `param` ends in a dot."""
    try:
        yield
    except MasqueradeError as error:
        error.param = f"{param}{error.param}" if param.endswith(".") else param
        raise


def field_of(role: str) -> str:
    """The field of a job's request for the file of a role."""
    return f"{role}_file" if role in ("training", "validation") else f"method.mask.{role}_file"
