"""Starting, dying, stopping: the port stays, jobs end once, no process is left behind."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.running import Server, images_of, running

GOOD = {"prompt": "a red circle on a blue background", "num_inference_steps": 3, "seed": 5}
LONG = {"prompt": "a red circle", "num_inference_steps": 500, "seed": 1}


@pytest.fixture
def fresh(tmp_path: Path, models_dir: Path) -> Iterator[Server]:
    server = Server(
        {"MODELS_DIR": str(models_dir), "DRAIN_TIMEOUT": "60", "MAX_CONCURRENCY": "2"}, tmp_path / "server.log"
    )
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Server]:
    """One whose workers may be killed, for tests after which it is as good as before."""
    environ = {"MODELS_DIR": str(models_dir), "MAX_CONCURRENCY": "2"}
    with running(environ, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


def restarts(server: Server) -> int:
    return int(server.client.get("/health/ready").json()["workers"][0]["restarts"])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pid: int, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def wait_busy(server: Server) -> None:
    deadline = time.monotonic() + 60
    while not any(w["busy"] for w in server.client.get("/health/ready").json()["workers"]):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_answers_before_it_can_work_and_says_so(fresh: Server) -> None:
    fresh.wait_live()
    ready = fresh.client.get("/health/ready")
    assert (ready.status_code, ready.json()["state"]) == (503, "STARTING")
    assert fresh.client.get("/ping").status_code == 204
    early = fresh.post(GOOD)  # waits for the worker rather than failing
    assert early.status_code == 200
    assert "init" in early.json()["$timings"]
    assert "init" not in fresh.post(GOOD).json()["$timings"]
    assert fresh.client.get("/ping").status_code == 200


def test_a_worker_that_dies_is_replaced_and_its_job_is_done_all_the_same(living: Server) -> None:
    living.wait_ready()
    before = restarts(living)
    alone = images_of(living.post(GOOD).json())[0]
    slow = {**GOOD, "num_inference_steps": 60}
    slow_alone = images_of(living.post(slow).json())[0]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(living.post, inputs) for inputs in (slow, GOOD, GOOD)]
        wait_busy(living)
        (pid,) = living.worker_pids()
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        assert living.client.get("/health/live").status_code == 200
        answers = [job.result() for job in jobs]
    assert [a.status_code for a in answers] == [200, 200, 200]
    for answer, reference in zip(answers, (slow_alone, alone, alone), strict=True):
        # made in company, where the kernels sum in another order
        assert np.abs(images_of(answer.json())[0].astype(int) - reference).max() <= 1
    assert living.process.poll() is None
    assert restarts(living) == before + 1


@pytest.mark.parametrize(
    ("how", "deaths"), [(signal.SIGSEGV, 2), pytest.param(signal.SIGKILL, 3, marks=pytest.mark.slow)]
)
def test_a_job_whose_worker_dies_again_and_again_is_failed_not_retried_for_ever(
    living: Server, how: signal.Signals, deaths: int
) -> None:
    living.wait_ready()
    before = restarts(living)
    mine = {**LONG, "prompt": f"a red circle, until {how.name}"}  # nobody has heard of it
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        job = pool.submit(living.post, mine)
        for _ in range(deaths):
            wait_busy(living)
            os.kill(living.worker_pids()[0], how)
            seen = time.monotonic() + 30
            while living.client.get("/health/ready").status_code == 200 and time.monotonic() < seen:
                time.sleep(0.02)
        assert job.result().status_code == 422
    assert job.result().json()["$error"]["code"] == "JOB_KILLED_WORKER"
    assert living.post(GOOD).status_code == 200
    assert restarts(living) == before + deaths
    assert living.post(mine).json()["$error"]["code"] == "JOB_KILLED_WORKER"  # the same again: said at once


def test_sigterm_finishes_what_runs_refuses_what_is_new_and_leaves_nothing(fresh: Server) -> None:
    fresh.wait_ready()
    pids = fresh.worker_pids()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running_jobs = [pool.submit(fresh.post, {**LONG, "num_inference_steps": 100 + n}) for n in range(2)]
        while fresh.client.get("/health/ready").json()["workers"][0]["running"] != 2:
            time.sleep(0.01)
        waiting_job = pool.submit(fresh.post, GOOD)
        while fresh.client.get("/health/ready").json()["queue"] != 1:
            time.sleep(0.01)
        fresh.process.send_signal(signal.SIGTERM)
        assert waiting_job.result().json()["$error"]["code"] == "NOT_READY"
        assert [job.result().status_code for job in running_jobs] == [200, 200]
    assert fresh.process.wait(10) == 0
    for pid in pids:
        wait_gone(pid)


@pytest.mark.parametrize("busy", [False, True])
def test_kill_9_leaves_no_worker_behind(fresh: Server, busy: bool) -> None:
    fresh.wait_ready()
    (pid,) = fresh.worker_pids()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        if busy:
            pool.submit(fresh.post, LONG)
            wait_busy(fresh)
        fresh.process.kill()
        wait_gone(pid)


@pytest.mark.slow
def test_a_worker_that_cannot_start_is_given_up_and_said(models_dir: Path, tmp_path: Path) -> None:
    server = Server({"MODELS_DIR": str(models_dir), "DEVICES": "cuda:9"}, tmp_path / "server.log")
    try:
        server.wait_live()
        deadline = time.monotonic() + 120
        while server.client.get("/health/ready").json()["state"] != "DEFUNCT":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert server.client.get("/health/live").status_code == 200
        assert server.client.get("/healthcheck").status_code == 503
        assert server.post(GOOD).json()["$error"]["code"] == "NOT_READY"
        assert "cuda:9" in server.log.read_text()
    finally:
        server.stop()


def test_a_port_in_use_is_said_in_a_sentence(living: Server) -> None:
    import sys

    from tests.running import ROOT

    command = [sys.executable, "-m", "api", "serve", "--port", str(living.port), "--host", "127.0.0.1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 2
    assert str(living.port) in out.stderr
    assert "Traceback" not in out.stderr


def test_port_0_tells_which_port_it_took(models_dir: Path) -> None:
    import sys

    from tests.running import ROOT

    process = subprocess.Popen(
        [sys.executable, "-m", "api", "serve", "--port", "0", "--host", "127.0.0.1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        url = process.stdout.readline().split()[2]
        assert httpx.get(url + "health/live").status_code == 200
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_deaths_after_a_good_start_never_add_up_to_defunct(living: Server) -> None:
    living.wait_ready()
    before = restarts(living)
    for death in range(1, 4):
        os.kill(living.worker_pids()[0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (
            not (now := living.client.get("/health/ready").json()["workers"][0])["ready"]
            or now["restarts"] < before + death
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert living.post(GOOD).status_code == 200


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"PORT": "eighty"}, "PORT"),
        ({"HOST": "no.such.host.invalid"}, "no.such.host"),
        ({"MODEL_ID": "no/such", "RUNTIME_DOWNLOADS": "0"}, "Not here: no/such"),
        ({"MODEL_URL": "ftp://h/x.tar"}, "one of the forms"),
        ({"MODEL_ID": "../x"}, "model id"),
    ],
)
def test_a_configuration_that_cannot_work_ends_with_a_sentence(environ: dict[str, str], said: str) -> None:
    import sys

    from tests.running import ROOT

    out = subprocess.run(
        [sys.executable, "-m", "api", "serve"],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 2
    assert said in out.stderr
    assert "Traceback" not in out.stderr
