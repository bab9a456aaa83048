"""Runs batches beside chats: a few requests at a time, in the background, through the application's own routes."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress

from starlette.datastructures import Headers

from masquerade.errors import LeaseLost, NotReady, UnsupportedParameter
from masquerade.http import errors
from masquerade.http.internal import InternalResponse, InternalSender
from masquerade.http.wire import encode, escape_line_ends
from masquerade.jobs import BATCH_OUTPUT, BatchRecord, BatchResults, BatchState, JobService
from masquerade.jobs.records import LEASE_SECONDS
from masquerade.jobs.results import digest
from masquerade.jobs.runner import RENEW_SECONDS
from masquerade.openai.batches.lines import BatchLine, find_faults, read_lines
from masquerade.service.workers import Turns

_log = logging.getLogger(__name__)
RETRY_SECONDS = 5.0  # after a failure of the disk or a table, and after a refusal that does not say when to retry
REPORT_SECONDS = 1.0  # least time between two updates of a batch's counts
REFUSED = (429, 503)  # the server has no room now, or the key has used up its minute: the request is sent again

Send = Callable[[InternalSender, str, bytes], Awaitable[InternalResponse]]


class BatchRunner:
    """Executes the open batches of a store. For one event loop.

    `send` sends a request to a route. `slots` requests of all batches run at a time; owners take them in turn, and an
    owner's batches run one after the other. `line_bytes` limits a request.

    Where servers share the table, a batch is run by the server that was asked to, as long as it renews its lease. It
    learns of requests to cancel a batch that another server has got when it does.
    """

    def __init__(self, job_service: JobService, send: Send, slots: int, line_bytes: int) -> None:
        self._jobs, self._batches = job_service, job_service.batches
        self._send = send
        self._slots, self._turns = slots, Turns(slots)
        self._line_bytes = line_bytes
        self._owners: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()  # batches whose requests have been ended
        self._leased_until = time.monotonic() + LEASE_SECONDS
        self._renewing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Go on with the batches that a server left, and delete results of which there is no open batch."""
        results = [*self._jobs.results.glob("*.jsonl")]  # before the batches: another server may add one meanwhile
        kept = {batch.id for batch in self._batches.open_batches()}
        for path in results:
            if path.name.partition(".")[0] not in kept:
                path.unlink(missing_ok=True)
        self._go_on(self._batches.claim_open())
        if self._batches.group.shared:
            self._renewing = asyncio.create_task(self._renew_leases(), name="leases")

    def add(self, batch_id: str) -> None:
        """Run a batch, unless it is running."""
        if batch_id not in self._tasks:
            self._spawn(batch_id)

    async def cancel(self, batch_id: str) -> BatchRecord:
        """Begin to cancel a batch: its requests end now, results are kept. Raises `StateConflict` after its end."""
        batch = await asyncio.to_thread(self._batches.ask_to_cancel, batch_id)
        self._interrupt(batch_id)
        return batch

    async def stop(self) -> None:
        """End all requests. The batches keep their states, and another server goes on with them."""
        tasks = [*self._tasks.values(), *([self._renewing] if self._renewing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._batches.group.shared:
            with suppress(NotReady):  # without its database, the leases end later
                await asyncio.to_thread(self._batches.release)

    def _interrupt(self, batch_id: str) -> None:
        """End the requests of a batch that is cancelling, and then the batch."""
        task = self._tasks.get(batch_id)
        if task is not None and not task.cancelling():
            self._cancelled.add(batch_id)
            task.cancel()
            self._spawn(batch_id, after=task)

    def _go_on(self, batches: Iterable[BatchRecord]) -> None:
        """Run the batches that are not running, and interrupt those that are cancelling."""
        for batch in batches:
            if batch.id not in self._tasks:
                if batch.state == "cancelling":
                    self._cancelled.add(batch.id)
                self._spawn(batch.id)
            elif batch.state == "cancelling" and batch.id not in self._cancelled:
                self._interrupt(batch.id)

    async def _renew_leases(self) -> None:
        """Renew the leases now and then; run the batches of servers that died, and end those that are lost."""
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            known, now = [*self._tasks], time.monotonic()  # before the database's clock is read
            try:
                batches = await asyncio.to_thread(self._batches.claim_open)
            except Exception as error:  # it is tried again until the leases have ended
                _log.warning("the leases of batches cannot be renewed: %s", error)
                lost = known if time.monotonic() >= self._leased_until else []
            else:
                self._leased_until = now + LEASE_SECONDS
                own = {batch.id for batch in batches}
                lost = [batch_id for batch_id in known if batch_id not in own]  # or ended
                self._go_on(batches)
            for task in [self._tasks[batch_id] for batch_id in lost if batch_id in self._tasks]:
                task.cancel()

    def _check_leases(self) -> None:
        """Raise `LeaseLost` if other servers may run the batches of this one."""
        if self._batches.group.shared and time.monotonic() >= self._leased_until:
            raise LeaseLost("this server's leases of batches have ended")

    def _spawn(self, batch_id: str, after: asyncio.Task[None] | None = None) -> None:
        task = self._tasks[batch_id] = asyncio.create_task(self._run(batch_id, after), name=batch_id)

        def forget(_: object) -> None:
            if self._tasks.get(batch_id) is task:
                del self._tasks[batch_id]
                self._cancelled.discard(batch_id)

        task.add_done_callback(forget)

    async def _run(self, batch_id: str, after: asyncio.Task[None] | None) -> None:
        """Bring a batch to its end; again if the disk or a table fails."""
        if after is not None:
            await asyncio.wait([after])
        while True:
            try:
                await asyncio.to_thread(self._batches.claim, batch_id)
                batch = await asyncio.to_thread(self._batches.get, batch_id)
                if batch.state == "validating":
                    batch = await asyncio.to_thread(self._validate, batch)
                if batch.is_open:
                    await self._execute(batch)
                return
            except FileNotFoundError:  # the store was restored without its files
                await asyncio.to_thread(self._fail, batch, "file_not_found", "the input file is gone from the store")
                return
            except LeaseLost:
                return
            except NotReady as error:
                _log.warning("the batch %s cannot be run; trying again: %s", batch_id, error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                _log.exception("the batch %s cannot be run; trying again", batch_id)
                await asyncio.sleep(RETRY_SECONDS)

    def _validate(self, batch: BatchRecord) -> BatchRecord:
        path, most = self._jobs.uploads.path(batch.input_file), self._jobs.table.quotas.rows
        total, faults = find_faults(path, batch.endpoint, self._line_bytes, most)
        if faults:
            return self._batches.set_state(batch.id, "failed", errors=faults)
        return self._batches.set_state(batch.id, "in_progress", total=total)

    async def _execute(self, batch: BatchRecord) -> None:
        """Answer the requests that are left, and publish the results."""
        results = await asyncio.to_thread(BatchResults, self._jobs.results, batch.id)
        end: BatchState = "cancelled" if batch.state == "cancelling" else "completed"
        try:
            if batch.state == "in_progress":
                execution = BatchExecution(self._jobs, batch, results, self._send, self._turns, self._check_leases)
                seconds = max(0.0, batch.expires_at - time.time())
                async with asyncio.timeout(seconds), self._owners[batch.owner]:
                    await execution.run(self._lines(batch), self._slots)
                await asyncio.to_thread(self._batches.set_state, batch.id, "finalizing")
        except TimeoutError:
            end = "expired"
            await asyncio.to_thread(self._give_up, batch, results)
        except KeyRefused as error:
            await asyncio.to_thread(self._fail, batch, "invalid_api_key", str(error))
            return
        finally:
            results.close()
        await asyncio.to_thread(self._publish, batch, results, end)

    def _lines(self, batch: BatchRecord) -> Iterator[BatchLine]:
        return read_lines(self._jobs.uploads.path(batch.input_file), batch.endpoint, self._line_bytes)

    def _give_up(self, batch: BatchRecord, results: BatchResults) -> None:
        """Write an error for each request that is left."""
        message = "This request could not be executed before the completion window expired."
        error = encode({"code": "batch_expired", "message": message})
        for line in self._lines(batch):
            results.append(line.custom_id, write_result(line.custom_id, error=error), failed=True)

    def _fail(self, batch: BatchRecord, code: str, message: str) -> None:
        """End a batch that cannot go on, without results."""
        fault = {"code": code, "line": None, "message": message, "param": None}
        self._batches.set_state(batch.id, "failed", errors=[fault])
        BatchResults(self._jobs.results, batch.id).discard()

    def _publish(self, batch: BatchRecord, results: BatchResults, end: BatchState) -> None:
        """Make files of the results, and end the batch."""
        files = {}
        for kind, path in (("output", results.output), ("error", results.errors)):
            if path.exists() and path.stat().st_size:
                name = f"{batch.id}_{kind}.jsonl"
                file = self._jobs.uploads.adopt(batch.owner, name, path, digest(path), BATCH_OUTPUT)
                files[f"{kind}_file"] = file.id
        self._batches.set_state(batch.id, end, completed=results.completed, failed=results.failed, **files)
        results.discard()


class KeyRefused(Exception):
    """The key of a batch is no longer valid."""


class BatchExecution:
    """Sends the requests of one batch and writes down the responses, each after a `check` that may raise."""

    def __init__(
        self,
        job_service: JobService,
        batch: BatchRecord,
        results: BatchResults,
        send: Send,
        turns: Turns,
        check: Callable[[], None],
    ) -> None:
        self._batches, self._batch, self._results = job_service.batches, batch, results
        self._send, self._turns, self._check = send, turns, check
        self._reported = 0.0

    async def run(self, lines: Iterator[BatchLine], most: int) -> None:
        """Send all requests without a result, `most` at a time. Raises `KeyRefused`, and `OSError` of the results."""
        places = asyncio.Semaphore(most)
        try:
            async with asyncio.TaskGroup() as group:
                while (line := await asyncio.to_thread(next, lines, None)) is not None:
                    if line.custom_id not in self._results.done:
                        await places.acquire()
                        group.create_task(self._run_line(line, places))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    async def _run_line(self, line: BatchLine, places: asyncio.Semaphore) -> None:
        """Send one request until it is not refused."""
        try:
            while (response := await self._respond(line)).status in REFUSED:
                await asyncio.sleep(float(response.headers.get("retry-after", RETRY_SECONDS)))
            if response.status == 401:
                raise KeyRefused(json.loads(response.body)["error"]["message"])
            text, failed = write_result(line.custom_id, response), response.status >= 400
            self._check()
            await asyncio.to_thread(self._results.append, line.custom_id, text, failed=failed)
            await self._report()
        finally:
            places.release()

    async def _respond(self, line: BatchLine) -> InternalResponse:
        if line.body.get("stream"):
            error = UnsupportedParameter("a request of a batch cannot be streamed", param="stream")
            return InternalResponse(error.status, Headers(), encode(errors.body(error)))
        await self._turns.acquire(self._batch.owner)
        try:
            sender = InternalSender(self._batch.owner, max(1.0, self._batch.expires_at - time.time()))
            return await self._send(sender, self._batch.endpoint, line.content)
        finally:
            self._turns.release()

    async def _report(self) -> None:
        """Record the counts, now and then."""
        if time.monotonic() - self._reported >= REPORT_SECONDS:
            self._reported = time.monotonic()
            counts = self._results.completed, self._results.failed
            await asyncio.to_thread(self._batches.set_counts, self._batch.id, *counts)


def write_result(custom_id: str, response: InternalResponse | None = None, error: str = "null") -> str:
    """The line of a result; `error` is JSON, for a request that got no response."""
    written = "null"
    if response is not None:
        request_id = encode(response.headers.get("x-request-id", ""))
        body = escape_line_ends(response.body.replace("\n", " "))  # JSON has line breaks between its tokens only
        written = f'{{"status_code":{response.status},"request_id":{request_id},"body":{body}}}'
    result_id = f"batch_req_{secrets.token_hex(12)}"
    return f'{{"id":"{result_id}","custom_id":{encode(custom_id)},"response":{written},"error":{error}}}'
