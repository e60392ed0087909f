"""One job a domain at a time. A second one is told at once who holds the first; queries never ask for it.

    with domain.jobs.hold("start", who) as job:
        job.progress = "opening disks"

It is released when the block ends, however it ends, so a job that dies leaves nothing behind. `destroy` is not kept out by a
job: it breaks the one that is there. One that leaves the domain as it was when it is broken is `abortable`. Left out: a queue. Who comes
second decides himself whether to come again.
"""
from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager

from kvmapp.errors import JobRunning, KvmappError, WrongState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class JobBroken(KvmappError):
    """The job was ended by a destroy, or by domjobabort."""
    code = "job-broken"


class Job:
    __slots__ = ("abortable", "aborted", "begun", "broken_by", "progress", "released", "since", "task", "verb", "who")

    def __init__(self, verb: str, who: str):
        self.verb, self.who = verb, who
        self.since = time.time()
        self.begun = time.monotonic()
        self.progress: str | None = None
        self.broken_by: str | None = None
        self.abortable = self.aborted = False
        self.task = asyncio.current_task()
        self.released = asyncio.Event()

    def to_dict(self) -> dict[str, object]:
        return {"verb": self.verb, "who": self.who, "since": self.since, "progress": self.progress}


class Jobs:
    """The place for one job of one domain. `changed(job, begins)` is called when it is taken and left."""

    def __init__(self, domain: str, changed: Callable[[Job, bool], None]):
        self.domain = domain
        self.changed = changed
        self.current: Job | None = None

    @contextmanager
    def hold(self, verb: str, who: str) -> Iterator[Job]:
        """Raises JobRunning; JobBroken when a destroy ends it."""
        if self.current is not None:
            raise self.busy(verb, self.current)
        job = self.current = Job(verb, who)
        self.changed(job, True)
        try:
            yield job
        except asyncio.CancelledError:
            if job.broken_by is None:
                raise
            what = "that was aborted" if job.aborted else "it was destroyed meanwhile"
            raise JobBroken(f"Cannot {verb} domain '{self.domain}': {what} by {job.broken_by}") from None
        finally:
            self.current = None
            job.released.set()
            self.changed(job, False)

    def busy(self, verb: str, job: Job) -> JobRunning:
        clock = time.strftime("%H:%M:%S", time.localtime(job.since))
        progress = f", {job.progress}" if job.progress else ""
        return JobRunning(f"Cannot {verb} domain '{self.domain}': job '{job.verb}' of {job.who} holds it since {clock} "
                          f"({time.monotonic() - job.begun:.0f} s{progress})",
                          f"wait for it, or end {self.end_of(job)}",
                          verb=job.verb, who=job.who, since=job.since)

    def end_of(self, job: Job) -> str:
        return f"it with: kvmappctl domjobabort {self.domain}" if job.abortable else f"the domain with: kvmappctl destroy {self.domain}"

    async def abort(self, who: str) -> None:
        """Ends the job that is there, and the domain is as it was before. Raises WrongState where that cannot be."""
        job = self.current
        if job is None or job.task is None:
            raise WrongState("Requested operation is not valid: no job is active on the domain")
        if not job.abortable:
            raise WrongState(f"Requested operation is not valid: job '{job.verb}' of {job.who} cannot be aborted",
                             f"wait for it, or end {self.end_of(job)}")
        job.broken_by, job.aborted = who, True
        job.task.cancel()
        await job.released.wait()

    async def break_current(self, who: str) -> None:
        """Ends the job that is there, and one that takes its place meanwhile; whoever awaits this can hold the place at once."""
        while (job := self.current) is not None and job.task is not None and job.task is not asyncio.current_task():
            job.broken_by = who
            job.task.cancel()
            await job.released.wait()
