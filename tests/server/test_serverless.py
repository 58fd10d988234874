"""The RunPod worker in its own process, with the platform's own SDK, against a stand-in for the platform."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running import ROOT, free_port, images_of, pixels
from tests.runpod_platform import KEY, Job, Platform
from tests.tiny import save_tiny

STEPS = 12


class Handler:
    """``python -m api start`` with what the platform puts into the environment."""

    def __init__(self, platform: Platform, name: str, folder: Path, **environ: str) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        env = {**os.environ, **platform.environ(name), "LOG_FORMAT": "text", "STATE_DIR": str(folder / name), **environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "api", "start"],
            cwd=ROOT,
            env=env,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def children(self) -> list[int]:
        """The worker of the engine, and the process that the SDK forks for its signs of life."""
        out = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in out.stdout.split()]

    def engine(self) -> int:
        out = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "api.worker"], capture_output=True, text=True, check=True
        )
        return int(out.stdout)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(120)


@pytest.fixture
def platform() -> Iterator[Platform]:
    with Platform() as started:
        yield started


@contextlib.contextmanager
def handler(platform: Platform, name: str, folder: Path, **environ: str) -> Iterator[Handler]:
    started = Handler(platform, name, folder, **environ)
    try:
        yield started
    except BaseException:
        print(started.text[-6000:])
        raise
    finally:
        started.kill()


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked for its status yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def simple(seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", "seed": seed, "num_inference_steps": STEPS, **more}


def native(seed: int, **more: Any) -> dict[str, Any]:
    return {"modelInputs": simple(seed), "callInputs": more}


def picture(job: Job) -> bytes:
    output = job.output
    image = output["image"] if "image" in output else output["image_base64"]
    assert images_of({"image_base64": image})[0].shape == (64, 64, 3)
    return pixels(image).tobytes()


@pytest.mark.slow
def test_jobs_progress_failures_stops_and_a_death_in_the_middle(platform: Platform, tmp_path: Path) -> None:
    with handler(platform, "w1", tmp_path, DRAIN_TIMEOUT="60") as first:
        good = [platform.send(simple(seed)) for seed in range(3)] + [platform.send(native(seed)) for seed in range(3)]
        watched = platform.send({**native(7, streamEvents=True, preview=4)})
        bad = [platform.send(wrong) for wrong in ({"prompt": "x", "width": 7}, {"modelInputs": {}, "x": 1}, {}, None)]
        platform.refuse = 2
        platform.wait_final(*good, watched, *bad)
        for seed in range(3):  # both forms are the same request
            assert abs(pixels_of(good[seed]) - pixels_of(good[seed + 3])).max() <= 1
        assert good[0].output.keys() >= {"image", "seed", "meta", "timings"}
        assert good[3].output.keys() >= {"$meta", "image_base64", "$timings", "$mem_usage"}
        assert "input.width" in bad[0].error
        assert bad[1].error.startswith("UNKNOWN_INPUT")
        assert all(job.error.startswith("MISSING_INPUT") for job in bad[2:])
        steps = [event["step"] for event in watched.stream if event.get("status") == "progress"]
        assert steps == sorted(set(steps))
        assert steps[-1] == STEPS
        previews = [event for event in watched.stream if event["status"] == "preview"]
        assert base64.b64decode(previews[0]["image_base64"])[:2] == b"\xff\xd8"
        assert good[0].stream == []
        assert platform.keys == {KEY}

        # a job that is stopped leaves at its next step, and the worker goes on
        long = platform.send(simple(1, num_inference_steps=500))
        platform.wait(lambda: any("step" in update for update in long.progress))
        platform.stop_job(long)
        platform.wait(lambda: "it is cancelled" in first.text)
        after = platform.send(simple(2))
        platform.wait_final(after)
        assert (pixels_of(after) == pixels_of(good[2])).all() or abs(pixels_of(after) - pixels_of(good[2])).max() <= 1

        # a worker that is gone: what it ran is done by the next one
        caught = [platform.send(simple(seed, num_inference_steps=100)) for seed in range(4)]
        platform.wait(lambda: all(job.progress for job in caught))
        children = first.children()
        assert len(children) >= 2
        first.kill()
        platform.wait(lambda: all(is_gone(pid) for pid in children), "children outlive a handler that was killed")
        assert {job.id for job in platform.lose("w1")} == {job.id for job in caught}
    with handler(platform, "w2", tmp_path, DRAIN_TIMEOUT="60") as second:
        platform.wait_final(*caught)
        # told to go: what runs is finished, what comes is left to others
        running = platform.send(simple(5, num_inference_steps=100))
        platform.wait(lambda: running.progress)
        began = time.monotonic()
        second.process.terminate()
        platform.wait(lambda: "shutting down" in second.text)
        assert second.process.wait(120) == 0, second.text[-3000:]
        assert picture(running)
        assert running.ended - began < 60
        assert "Traceback" not in second.text
    assert all((job.taken, job.worker) == (2, "w2") for job in caught)
    assert all(job.taken == 1 for job in (*good, watched, *bad, long, after, running))
    assert [job.late for job in platform.jobs.values() if job.late] == []
    assert {ping["worker"] for ping in platform.pings} == {"w1", "w2"}
    assert any(running.id in (ping.get("job_id") or "") for ping in platform.pings)
    ready = next(line for line in first.text.splitlines() if "ready for jobs after" in line)
    assert all(f"{phase} " in ready for phase in ("service", "sdk", "torch", "diffusers", "build", "read"))


def pixels_of(job: Job) -> Any:
    output = job.output
    return pixels(output["image"] if "image" in output else output["image_base64"]).astype(int)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_in_the_terminal(tmp_path: Path) -> None:
    """As one tries it before there is an endpoint: no platform, one job, its result in the log."""
    command = [sys.executable, "-m", "api", "runpod", "--test_input", '{"input": {"prompt": "a red circle"}}']
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    environ |= {"STATE_DIR": str(tmp_path / "state")}
    out = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=120)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "completed successfully" in out.stdout
    refused = subprocess.run([*command[:-1], "{"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "not JSON" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_jobs_through_every_kind_of_trouble(platform: Platform, tmp_path: Path) -> None:
    wrong: list[Any] = [{"prompt": "x", "width": 7}, {"modelInputs": []}, {}, "x", {"prompt": "x", "no_such": 1}]

    def send(number: int) -> Job:
        if number % 10 == 3:
            return platform.send(wrong[number // 10])
        if number % 10 == 7:
            return platform.send(simple(number, num_inference_steps=500))
        if number % 5 == 0:
            return platform.send({**native(number, streamEvents=True), "refresh_worker": False})
        return platform.send(simple(number, num_inference_steps=STEPS + number))

    environ = {"MAX_CONCURRENCY": "6", "DRAIN_TIMEOUT": "60"}
    jobs = [send(number) for number in range(50)]
    stopped = jobs[7::10]
    rest = [job for job in jobs if job not in stopped]

    def over() -> list[Job]:
        return [job for job in jobs if job.final is not None]

    with handler(platform, "w1", tmp_path, **environ) as first, handler(platform, "w2", tmp_path, **environ) as second:
        platform.wait(lambda: len(over()) >= 8)
        # the engine of the first one dies under its jobs
        os.kill(first.engine(), signal.SIGKILL)
        platform.refuse = 3
        platform.wait(lambda: len(over()) >= 16)
        # the first one goes, and is told so
        first.process.terminate()
        # those that run for ever are cancelled by whoever sent them, wherever they are
        stop_all(platform, stopped, 0)
        platform.wait(lambda: len(over()) >= 24)
        second.kill()
        platform.lose("w2")
        assert first.process.wait(120) == 0
        platform.lose("w1")
    with handler(platform, "w3", tmp_path, **environ) as third:
        while any(job.final is None for job in rest):
            stop_all(platform, stopped, 0)
            time.sleep(0.05)
        stop_all(platform, stopped, 1)
        extra = platform.send(simple(1))
        platform.wait_final()
        assert third.stop() == 0
    for number, job in enumerate(jobs):
        if number % 10 == 3:
            assert ": " in job.error
        elif number % 10 == 7:
            assert job.final == {"status": "CANCELLED"}
        else:
            assert picture(job)
    assert picture(extra)
    # at least once each, more than once only where a worker was lost, and one result of each that counts
    assert all(1 <= job.taken <= 3 for job in jobs)
    assert not [
        job.id for job in jobs for late in job.late if "output" in late and job.final != {"status": "CANCELLED"}
    ]


def stop_all(platform: Platform, jobs: list[Job], least: int) -> None:
    """Cancel those of them that run."""
    platform.wait(lambda: sum(bool(job.worker) or job.stopped for job in jobs) >= least)
    for job in jobs:
        if job.worker and not job.stopped:
            platform.stop_job(job)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("place", ["baked", "volume", "cached"])
def test_the_model_may_lie_in_the_image_on_the_volume_or_in_the_platforms_cache(
    platform: Platform, tmp_path: Path, place: str
) -> None:
    model, empty = tmp_path / "model", tmp_path / "empty"
    save_tiny(model, seed=1)
    empty.mkdir()
    environ = {"MODEL_ID": "org/tiny", "RUNTIME_DOWNLOADS": "0", "MODELS_DIR": str(empty), "HUB_CACHES": str(empty)}
    environ["BAKED_MODELS_DIR"] = str(empty)
    if place == "cached":
        repository = tmp_path / "hub" / "models--org--tiny"
        commit = "d" * 40
        shutil.copytree(model, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        environ["HUB_CACHES"] = str(tmp_path / "hub")
    elif place == "volume":
        shutil.copytree(model, tmp_path / "volume" / "org--tiny")
        environ["MODELS_DIR"] = str(tmp_path / "volume")
    else:
        command = [sys.executable, "-m", "api", "download", "org/tiny", "--into", str(tmp_path / "baked")]
        more = {"LOCAL_MODELS": "", "CHECKPOINT_URL": "", "MODEL_URL": ""}
        from tests.hub import HubStandIn

        with HubStandIn({"org/tiny": {"main": model}}) as hub:
            env = {**os.environ, **more, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
            subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
        environ["BAKED_MODELS_DIR"] = str(tmp_path / "baked")
    with handler(platform, "w1", tmp_path, **environ) as worker:
        job = platform.send(native(1))
        platform.wait_final(job)
        assert job.output["$meta"]["MODEL_ID"] == "org/tiny"
        assert worker.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_worker_that_is_to_be_replaced_says_so_and_ends(platform: Platform, tmp_path: Path) -> None:
    with handler(platform, "w1", tmp_path) as worker:
        job = platform.send(simple(1, refresh_worker=True))
        platform.wait_final(job)
        assert job.final is not None
        assert job.final["stopPod"] is True
        assert worker.process.wait(60) == 0
    with handler(platform, "w2", tmp_path, DEVICES="cuda:7") as broken:
        waiting = platform.send(simple(1))
        assert broken.process.wait(200) == 1
        assert waiting.taken == 0
        assert any(ping.get("status") == "unhealthy" for ping in platform.pings)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_behind_the_load_balancer_it_is_the_server_with_a_port_for_pings(platform: Platform, tmp_path: Path) -> None:
    port, health = free_port(), free_port()
    environ = {"HOST": "127.0.0.1", "PORT": str(port), "PORT_HEALTH": str(health)}
    seen: list[int] = []

    def ping() -> int:
        with contextlib.suppress(httpx.TransportError):
            seen.append(httpx.get(f"http://127.0.0.1:{health}/ping").status_code)
        return seen[-1] if seen else 0

    with handler(platform, "w1", tmp_path, **environ) as server:
        platform.wait(lambda: ping() == 200)
        assert set(seen) <= {204, 200}
        assert seen[0] == 204
        answer = httpx.post(f"http://127.0.0.1:{port}/", json={"modelInputs": simple(1)}, timeout=300)
        assert answer.json()["image_base64"]
        assert server.stop() == 0
