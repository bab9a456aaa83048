"""Requests for builds: checked in full, then queued as jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maskstore import InvalidName, MaskNotFound, check_name
from masquerade.errors import InvalidValue, PersonaExists, PersonaForbidden, UnsupportedParameter, UploadNotFound
from masquerade.jobs import Job, JobService, Repeat, draw_job_id
from masquerade.service import building
from masquerade.service.rights import Rights
from masquerade.service.serving import Serving

PURPOSE = "fine-tune"  # of the files that builds read


@dataclass(frozen=True)
class BuildRequest:
    """What to build. Errors about it name the fields of `POST /v1/fine_tuning/jobs`."""

    model: str  # the base
    files: Mapping[str, str]  # ids by role: training, validation, contrast, contrast_validation, neutral, card
    persona: str | None = None  # without a name, the persona is named after its job
    opposite: str | None = None  # publish the opposite too, under this name
    replace: bool = False
    system_prompt: str | None = None
    contrast_prompt: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)  # the fields of `pruning.Recipe` that the client set
    seed: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    method: Mapping[str, Any] | None = None  # as the client sent it, for the job object

    @property
    def is_prompted(self) -> bool:
        """Whether the base writes the examples itself, from a system prompt or a character card."""
        return self.system_prompt is not None or "card" in self.files


def submit(
    serving: Serving, job_service: JobService, rights: Rights, owner: str, request: BuildRequest, repeat: Repeat
) -> Job:
    """Queue a build; the job that exists already if the request repeats one.

    Reads the files in full, so that every error in them is raised before the job begins. Raises `ModelNotFound` and
    `UnsupportedParameter` for the model, `ScopeMissing`, `PersonaForbidden`, `PersonaExists`, `UploadNotFound`,
    `InvalidValue`, `BadDataset` with the numbers of the lines, and `StateConflict` as `building.check_base`.
    """
    serving.find_reference(request.model, None, None)
    if request.model != serving.base.name:
        raise UnsupportedParameter("a persona is built from the base, not from another persona", param="model")
    building.check_base(serving.base)
    _check_combinations(request)
    spec, job_id = _make_spec(serving, request), draw_job_id()
    names = building.JobNames.of(job_id, spec)
    _check_rights(serving, rights, request, names)
    job = job_service.table.find_repeated(owner, spec, repeat)
    if job is None:
        for role, file_id in spec["files"].items():
            _check_file(job_service, owner, file_id, building.field_of(role))
        _check_names(serving, job_service, owner, spec, names)
        building.check(job_service, spec, names)
        job = job_service.table.add_job(owner, spec, repeat, job_id)
        job_service.runner.wake()
    return job


def _check_combinations(request: BuildRequest) -> None:
    """Raises `InvalidValue` for fields that contradict each other."""
    if request.contrast_prompt is not None and not request.is_prompted:
        raise InvalidValue("contrast_prompt needs a system_prompt or a card_file", param="method.mask.contrast_prompt")
    if request.system_prompt is not None and "card" in request.files:
        raise InvalidValue("give a system_prompt or a card_file, not both", param="method.mask.card_file")
    if request.is_prompted and "contrast" in request.files:
        raise InvalidValue(
            "with a system prompt or a card the base writes the contrast itself; say how in contrast_prompt",
            param="method.mask.contrast_file",
        )
    if request.persona == "":
        raise InvalidValue("the name is empty; without the field, the persona gets its job's", param="suffix")
    if request.replace and request.persona is None:
        raise InvalidValue("to replace a persona, give its name in `suffix`", param="suffix")
    if request.system_prompt is not None and not request.system_prompt.strip():
        raise InvalidValue("the system prompt is empty", param="method.mask.system_prompt")


def _make_spec(serving: Serving, request: BuildRequest) -> dict[str, Any]:
    """The job's spec, as JSON; two requests for the same build have equal specs."""
    prompt = {"system": request.system_prompt or "", "contrast": request.contrast_prompt or ""}
    return {
        "base": {"name": serving.base.name, "fingerprint": serving.base.fingerprint},
        "persona": request.persona,
        "opposite": request.opposite,
        "replace": request.replace,
        "prompt": prompt if request.is_prompted else None,
        "files": dict(request.files),
        "recipe": {**request.recipe, "seed": request.seed},
        "method": request.method,
        "metadata": dict(request.metadata),
        "seed": request.seed,
    }


def _check_file(job_service: JobService, owner: str, file_id: str, param: str) -> None:
    """The file must belong to the owner and have the purpose of builds."""
    try:
        file = job_service.table.get_file(file_id, owner)
    except UploadNotFound as error:
        error.param = param
        raise
    if file.purpose != PURPOSE:
        raise InvalidValue(f"{file_id} has the purpose {file.purpose!r}; it must be {PURPOSE!r}", param=param)


def _check_rights(serving: Serving, rights: Rights, request: BuildRequest, names: building.JobNames) -> None:
    """As `building.check_rights`; the error about a made name says where the name comes from."""
    try:
        building.check_rights(rights, serving.registry, names, replace=request.replace)
    except PersonaForbidden as error:
        if request.persona is not None or error.param != "suffix":
            raise
        raise PersonaForbidden(
            f"no `suffix` was given, and this key may not use the name that was made, {names.persona!r}; give a "
            "`suffix` that is on the key's list",
            param="suffix",
        ) from error


def _check_names(
    serving: Serving, job_service: JobService, owner: str, spec: Mapping[str, Any], names: building.JobNames
) -> None:
    """The names must be valid, differ, and be free unless the build replaces a persona.

    A persona that a refused job of the same build has published is no obstacle.
    """
    if names.opposite == names.persona:
        raise InvalidValue("the opposite needs a name of its own", param="method.mask.contrast_name")
    open_jobs = {
        name: job
        for job in job_service.table.open_jobs()
        for name, _ in building.JobNames.of(job.id, job.spec).fields()
    }
    aliases = serving.registry.aliases()
    published = building.find_published(job_service, owner, spec)
    for persona, param in names.fields():
        try:
            check_name(persona)
        except InvalidName as error:
            raise InvalidValue(error.message, param=param) from error
        if persona in aliases:
            raise PersonaExists(f"{persona!r} is an alias; a persona needs a name of its own", param=param)
        if spec["replace"]:
            continue
        if job := open_jobs.get(persona):
            which = f"the job {job.id}" if job.owner == owner else "a job of another key"
            raise PersonaExists(f"{which} is building {persona!r} already", param=param)
        try:
            current = serving.registry.resolve(persona)
        except MaskNotFound:
            continue
        if published.get(persona) == current.digest:  # it stays; this request goes on for its opposite
            continue
        raise PersonaExists(
            f"there is a persona {persona!r}; set method.mask.replace to make a new generation of it", param=param
        )
