"""A server that is killed, again and again, while it receives files and builds: nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI

from maskstore import fsck
from masquerade.jobs import JobTable, open_group
from tests.building.asking import QUICK, RECIPE, UNFINISHED, build, connect, finish, order, upload
from tests.serving import serve

KILLS = int(os.environ.get("MASQUERADE_KILLS", "2"))  # 30 for a thorough run
QUEUED = 3  # most jobs to have waiting


@pytest.mark.timeout(600 + 60 * KILLS)
def test_what_was_acknowledged_survives_being_killed_at_any_moment(tmp_path: Path) -> None:
    rng, store = random.Random(KILLS), tmp_path / "store"
    files: set[str] = set()
    jobs: set[str] = set()
    for kill in range(KILLS):
        with serve("--model", "demo", "--store", str(store)) as server, connect(server) as sdk:
            check(sdk, files, jobs)
            moment = threading.Timer(rng.choice((0.3, 6)) * rng.random(), server.process.kill)
            moment.start()
            with suppress(APIConnectionError):  # until it is killed
                work(sdk, f"p{kill}", files, jobs)
            moment.join()
            server.process.wait()
        assert fsck(store).clean
    with serve("--model", "demo", "--store", str(store)) as server, connect(server) as sdk:
        check(sdk, files, jobs)
        ended = [finish(sdk, job.id, 600) for job in sdk.fine_tuning.jobs.list(limit=100)]
        assert {job.status for job in ended} <= {"succeeded"}, ended
        assert {job.fine_tuned_model for job in ended} <= {model.id for model in sdk.models.list()}
        results = {file for job in ended for file in job.result_files}
        known = {file.id for file in sdk.files.list()}
        assert results <= known
    assert fsck(store).clean
    assert {path.name for path in (store / "jobs" / "files").iterdir()} == known
    assert not list((store / "builds").glob("*"))
    assert not list((store / "quarantine").glob("*"))
    assert not list((store / "masks").rglob(".*.tmp"))


@pytest.mark.timeout(600)
def test_a_server_that_is_stopped_puts_its_job_back_and_goes_on_with_it(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with serve("--model", "demo", "--store", str(store)) as server, connect(server) as sdk:
        job = build(sdk, "p", samples=64).id
        while not any(event.message.startswith("backward") for event in sdk.fine_tuning.jobs.list_events(job)):
            time.sleep(0.05)
        server.process.terminate()
        server.process.wait()
        assert "Traceback" not in server.said()
    assert JobTable(open_group(store / "jobs" / "jobs.sqlite")).get_job(job).state == "queued"
    assert list((store / "builds").glob("job-*/**/*.safetensors"))
    with serve("--model", "demo", "--store", str(store)) as server, connect(server) as sdk:
        assert finish(sdk, job).status == "succeeded"
        told = [event.message for event in sdk.fine_tuning.jobs.list_events(job, limit=100)][::-1]
        assert "the server stopped; the job goes on" in told
        assert told.count("running") == 2
    assert not list((store / "builds").glob("*"))


def check(sdk: OpenAI, files: set[str], jobs: set[str]) -> None:
    """What was acknowledged is there."""
    assert files <= {file.id for file in sdk.files.list()}
    assert jobs <= {job.id for job in sdk.fine_tuning.jobs.list(limit=100)}


def work(sdk: OpenAI, name: str, files: set[str], jobs: set[str]) -> None:
    """Upload and queue, writing down what is acknowledged, and look on."""
    ids: list[str] = []
    for kind in ("gloomy.train", "cheerful.train", "facts"):
        ids += upload(sdk, kind)
        files.add(ids[-1])
    if sum(job.status in UNFINISHED for job in sdk.fine_tuning.jobs.list(limit=100)) < QUEUED:
        jobs.add(order(sdk, name, ids[0], RECIPE | QUICK | {"contrast_file": ids[1], "neutral_file": ids[2]}).id)
    while True:
        sdk.fine_tuning.jobs.list(limit=1)
        time.sleep(0.05)
