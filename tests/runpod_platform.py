"""A stand-in for RunPod's serverless platform, as its workers see it: hands out jobs, takes results, stops jobs.

What it does with them is what the real one does: a job belongs to the worker that took it; one whose worker is gone is
handed out again; the first final result of a job counts, and nothing that comes after it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.running import free_port

KEY = "rp-the-key-of-the-worker"
_POLL = 1.0
"""Seconds that a poll is held open; 90 there."""


@dataclass
class Job:
    """A job, as the platform knows it.

    Attributes:
        worker: who took it last.
        taken: how many times it was handed out.
        progress: outputs of IN_PROGRESS.
        stream: outputs of its events.
        final: its result, ``{"output": …}`` or ``{"error": …}``.
        late: what came after its end.
        stopped: it was cancelled, and its worker was told.
    """

    id: str
    input: Any
    worker: str = ""
    taken: int = 0
    progress: list[Any] = field(default_factory=list)
    stream: list[Any] = field(default_factory=list)
    final: dict[str, Any] | None = None
    late: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    ended: float = 0.0

    @property
    def output(self) -> Any:
        assert self.final is not None and "output" in self.final, f"{self.id}: {str(self.final)[:500]}"
        return self.final["output"]

    @property
    def error(self) -> str:
        assert self.final is not None and "error" in self.final, f"{self.id}: {str(self.final)[:500]}"
        return self.final["error"]


class Platform:
    """The platform, in a thread of its own. Use as a context.

    Attributes:
        jobs: all of them, in the order in which they were sent.
        pings: query of every sign of life, by worker.
        refuse: how many of the next results are answered with a 500.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.jobs: dict[str, Job] = {}
        self.pings: list[dict[str, str]] = []
        self.refuse = 0
        self.keys: set[str] = set()
        self._waiting: list[str] = []
        self._to_stop: dict[str, list[str]] = {}
        self._lock = threading.RLock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="platform", daemon=True)
        self._up = threading.Event()

    def __enter__(self) -> Platform:
        self._thread.start()
        assert self._up.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def environ(self, worker: str) -> dict[str, str]:
        """What the platform puts into a worker's environment."""
        base = f"http://127.0.0.1:{self.port}/v2/endpoint"
        return {
            "RUNPOD_ENDPOINT_ID": "endpoint",
            "RUNPOD_POD_ID": worker,
            "RUNPOD_AI_API_KEY": KEY,
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
        }

    # --- what its users do ---

    def send(self, input: Any, job_id: str | None = None) -> Job:
        with self._lock:
            job = Job(job_id or f"job-{len(self.jobs)}-u1", input)
            self.jobs[job.id] = job
            self._waiting.append(job.id)
            return job

    def stop_job(self, job: Job) -> None:
        """Cancel a job: its worker is told, where it has one."""
        with self._lock:
            if job.id in self._waiting:
                self._waiting.remove(job.id)
            job.stopped = True
            job.final, job.ended = {"status": "CANCELLED"}, time.monotonic()
            self._to_stop.setdefault(job.worker, []).append(job.id)

    def lose(self, worker: str) -> list[Job]:
        """A worker is gone: what it had not finished is handed out again."""
        with self._lock:
            lost = [job for job in self.jobs.values() if job.worker == worker and job.taken and job.final is None]
            lost = [job for job in lost if job.id not in self._waiting]
            self._waiting[:0] = [job.id for job in lost]
            return lost

    def wait(self, until: Callable[[], Any], why: str = "", limit: float = 900) -> None:
        deadline = time.monotonic() + limit
        while not until():
            assert time.monotonic() < deadline, why or "the platform waited in vain"
            time.sleep(0.02)

    def wait_final(self, *jobs: Job, limit: float = 900) -> None:
        wanted = jobs or tuple(self.jobs.values())
        self.wait(
            lambda: all(job.final is not None for job in wanted),
            f"no result: {[job.id for job in wanted if job.final is None]}",
            limit,
        )

    # --- what workers ask ---

    async def _take(self, request: web.Request) -> web.Response:
        worker = request.match_info["worker"]
        self.keys.add(request.headers.get("Authorization", ""))
        batch = request.match_info["take"] == "job-take-batch"
        most = int(request.query.get("batch_size", "1")) if batch else 1
        deadline = time.monotonic() + _POLL
        while time.monotonic() < deadline and request.transport is not None:  # else it is gone
            with self._lock:
                taken = [self.jobs[self._waiting.pop(0)] for _ in range(min(most, len(self._waiting)))]
                for job in taken:
                    job.worker, job.taken = worker, job.taken + 1
            if taken:
                given = [{"id": job.id, "input": job.input} for job in taken]
                return web.json_response(given if batch else given[0])
            await asyncio.sleep(0.01)
        return web.Response(status=204)

    async def _stop(self, request: web.Request) -> web.Response:
        worker = request.match_info["worker"]
        deadline = time.monotonic() + _POLL
        while time.monotonic() < deadline:
            with self._lock:
                ids = self._to_stop.pop(worker, [])
            if ids:
                return web.json_response({"jobsToStop": ids})
            await asyncio.sleep(0.01)
        return web.Response(status=204)

    async def _done(self, request: web.Request) -> web.Response:
        worker, job = request.match_info["worker"], self.jobs[request.match_info["job"]]
        body = json.loads(await request.text())
        with self._lock:
            if self.refuse and body.get("status") != "IN_PROGRESS":
                self.refuse -= 1
                return web.Response(status=500)
            if job.final is not None or job.worker != worker:
                job.late.append(body)
            elif body.get("status") == "IN_PROGRESS":
                job.progress.append(body["output"])
            else:
                job.final, job.ended = body, time.monotonic()
        return web.Response()

    async def _stream(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["job"]]
        body = json.loads(await request.text())
        with self._lock:
            if job.final is not None:
                job.late.append(body)
            else:
                job.stream.append(body["output"])
        return web.Response()

    async def _ping(self, request: web.Request) -> web.Response:
        self.pings.append({"worker": request.match_info["worker"], **request.query})
        return web.Response()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=2**26)
        base = "/v2/endpoint"
        app.router.add_get(base + "/{take:job-take|job-take-batch}/{worker}", self._take)
        app.router.add_get(base + "/job-stop/{worker}", self._stop)
        app.router.add_post(base + "/job-done/{worker}/{job}", self._done)
        app.router.add_post(base + "/job-stream/{worker}/{job}", self._stream)
        app.router.add_get(base + "/ping/{worker}", self._ping)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self.port).start())
        self._up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()
