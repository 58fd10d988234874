"""What ``/metrics`` tells, with workers that are played."""

from __future__ import annotations

import asyncio
import json
import random
import re
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from api.engine.executor import Executor
from api.engine.tally import OTHER, Tally
from api.errors import ApiError
from api.schema.counts import JOBS, SECONDS, Calls, Counts, DeviceMemory, Spread, plus
from api.schema.messages import Counted, Held, Loaded, Memory, frame, parse_from_worker
from api.schema.transfers import Transfer
from api.service.families import FAMILIES, PREFIX
from api.service.host_keeper import Use
from api.service.service import Service
from api.settings import Settings
from tests.playing import Playing, playing
from tests.running import ROOT
from tests.unit.test_workers import ref_of

DASHBOARD = ROOT / "deploy" / "grafana" / "diffusers-api.json"


def spread(bounds: tuple[float, ...], *values: float) -> Spread:
    made = Spread.over(bounds)
    for value in values:
        made.add(bounds, value)
    return made


def some_counts(jobs: int = 4) -> Counts:
    calls = Calls(spread(SECONDS, 0.02, 0.3), spread(JOBS, jobs, 1), 10)
    return Counts(
        calls={"UNet2DConditionModel.forward": calls},
        steps={"StableDiffusionPipeline": spread(SECONDS, 0.1)},
        loads={"disk": spread(SECONDS, 2.0)},
        moved_bytes={"read": 1000},
        moved_seconds={"read": 0.5},
        evictions={"device": 3},
        switches=2,
        shortages={"evict": 1},
        compiled={"loaded": 1},
    )


async def values(it: Playing) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample, by name and values of its labels in the order of their names."""
    text = (await it.client.get("/metrics")).text
    return {
        (sample.name.removeprefix(PREFIX), tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in parse(text)
        for sample in family.samples
    }


async def test_what_is_exposed_is_what_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family with the type and the labels of the table, in both formats."""
    async with playing(tmp_path, monkeypatch) as it:
        service: Any = it.service
        service.usage.snapshot = lambda: [a_usage("me")]
        service.webhooks.counts = lambda: {"pending": 1, "failed": 2, "delivered": 3}
        service.dispatcher.keeper = SimpleNamespace(use=lambda: Use(1, 2, 3), stop=lambda: None)
        (worker,) = service.dispatcher.workers
        worker._receive(Counted(some_counts(), DeviceMemory(1, 2, 3)))
        worker._receive(Loaded({"a": Held(ref_of("a"), "host", 0, 7, 0, "", 0.0)}, Memory(1, 2, 3, 4, 5)))
        assert (await it.post()).status_code == 200
        await it.post("", {"MODEL_ID": 7})
        fetched(service, "download")
        with it.service.watch.upload():
            pass
        plain = await it.client.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        other = await it.client.get("/metrics", headers=accept)
        assert other.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        for found in (list(parse(plain.text)), list(parse_openmetrics(other.text))):
            ours = {family.name.removeprefix(PREFIX): family for family in found if family.name.startswith(PREFIX)}
            assert {name.removesuffix("_total"): family.type for name, family in ours.items()} == {
                name: family.kind for name, family in FAMILIES.items()
            }
            for name, family in ours.items():
                labels = {tuple(sorted(set(sample.labels) - {"le"})) for sample in family.samples}
                told = {tuple(sorted(FAMILIES[name.removesuffix("_total")].labels))}
                assert labels == (told if name != "worker_resident_bytes" else set()), (
                    name
                )  # a played one has no process
            rest = {family.name for family in found if not family.name.startswith(PREFIX)}
            assert all(name.startswith("process_") for name in rest)
            assert "process_resident_memory_bytes" in rest


def a_usage(owner: str) -> dict[str, Any]:
    return {
        "owner": owner, "requests": 3, "images": 4, "device_seconds": 1.5, "load_seconds": 0.5, "failures": 1,
        "since": "whenever",
    }  # fmt: skip


async def test_what_keys_used_is_told_to_them_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {name: f"right-key-of-{name}" for name in ("alice", "bob", "root")}
    told = ",".join(f"{name}:{key}" for name, key in keys.items())
    async with playing(tmp_path, monkeypatch, API_KEYS=told, ADMIN_KEYS="root") as it:
        service: Any = it.service
        service.usage.snapshot = lambda: [a_usage(name) for name in ("alice", "bob")]
        for name, seen in (("alice", {"alice"}), ("root", {"alice", "bob"}), ("bob", {"bob"})):
            text = (await it.client.get("/metrics", headers={"Authorization": keys[name]})).text
            owners = {sample.labels["owner"] for f in parse(text) for sample in f.samples if "owner" in sample.labels}
            assert owners == seen, name


def fetched(service: Any, phase: str, fault: Exception | None = None) -> None:
    """A fetch whose events the service's watch reads."""
    readers: list[Any] = []
    outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    service.watch.fetching(readers, outcome)
    for status, done in (("start", 100), ("progress", 400), ("done", 1000)):
        if fault is None or status != "done":
            readers[0](Transfer("m", phase, status, done, 1000, 0, None))
    outcome.set_exception(fault) if fault else outcome.set_result(None)


async def test_what_happens_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(tmp_path, monkeypatch) as it:
        it.played.fails.add("bad")
        statuses = [(await it.post(prompt)).status_code for prompt in ("a", "bad", "b")]
        assert statuses == [200, 422, 200]
        assert (await it.client.get("/no/such/route")).status_code == 404
        stream = await it.post("bad", {"streamEvents": True})
        assert '"$error"' in stream.text.splitlines()[-1]
        two = {"prompt": "c", "num_images_per_prompt": 2}
        sent = [await it.client.post("/jobs", json={"modelInputs": inputs}) for inputs in (two, {"prompt": "bad"})]
        for answer in sent:
            await it.until_over(answer.json()["id"])
        fetched(it.service, "download")
        fetched(it.service, "extract", ApiError("SOURCE_UNREACHABLE", "no"))
        fetched(it.service, "extract", ApiError("CANCELLED", "no"))
        await asyncio.sleep(0)
        found = await values(it)
    assert found["http_requests_total", ("POST", "/", "200")] == 3
    assert found["http_requests_total", ("POST", "/", "422")] == 1
    assert found["http_requests_total", ("GET", "other", "404")] == 1
    assert found["http_requests_total", ("POST", "/jobs", "202")] == 2
    assert found["http_request_seconds_count", ("POST", "/")] == 4
    assert found["errors_total", ("PIPELINE_ERROR",)] == 3
    assert found["errors_total", ("NOT_FOUND",)] == 1
    assert found["jobs_ended_total", ("connection", "COMPLETED")] == 2
    assert found["jobs_ended_total", ("connection", "FAILED")] == 2
    assert found["jobs_ended_total", ("later", "COMPLETED")] == 1
    assert found["jobs_ended_total", ("later", "FAILED")] == 1
    assert found["jobs_ended_total", ("later", "CANCELLED")] == 0
    assert found["queue_seconds_count", ("connection",)] == 4
    assert found["queue_seconds_count", ("later",)] == 2
    assert found["job_seconds_count", ("later",)] == 2
    assert found["images_total", ()] == 4
    assert found["phase_seconds_sum", ("inference",)] == pytest.approx(0.06)
    assert found["fetches_total", ("completed",)] == found["fetches_total", ("failed",)] == 1
    assert found["fetches_total", ("cancelled",)] == 1
    assert found["fetched_bytes_total", ("download",)] == 900  # what an earlier attempt left was not fetched now
    assert found["fetched_bytes_total", ("extract",)] == 600
    assert found["fetch_seconds_count", ("download",)] == 1
    assert ("fetch_seconds_count", ("extract",)) not in found


async def test_the_end_of_a_job_is_in_the_log_with_its_timings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "api")
    async with playing(tmp_path, monkeypatch) as it:
        it.played.fails.add("bad")
        answer = await it.post("x")
        refused = await it.post("bad")
        later = (await it.client.post("/jobs", json={"modelInputs": {"prompt": "y"}})).json()["id"]
        await it.until_over(later)
    done, of_later = [record for record in caplog.records if record.message.startswith("job done")]
    assert done.request_id == answer.headers["x-request-id"]  # type: ignore[attr-defined]
    assert done.model == "demo/shapes"  # type: ignore[attr-defined]
    assert done.job_id == it.played.requests[0].id  # type: ignore[attr-defined]
    timings = done.timings  # type: ignore[attr-defined]
    assert {"queue", "loadModel", "inference", "encode"} <= set(timings)
    assert f"inference {timings['inference']} ms" in done.message
    (failed,) = [record for record in caplog.records if record.message.startswith("job failed")]
    assert failed.request_id == refused.headers["x-request-id"]  # type: ignore[attr-defined]
    assert failed.job_id == it.played.requests[1].id  # type: ignore[attr-defined]
    assert of_later.job_id == later  # type: ignore[attr-defined]


async def test_jobs_that_are_not_over_are_told_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(tmp_path, monkeypatch) as it:
        it.played._run = lambda worker, message: asyncio.sleep(0)  # type: ignore[method-assign,assignment,return-value]
        waiting = [asyncio.create_task(it.post(str(number))) for number in range(6)]
        async with asyncio.timeout(20):
            while it.service.dispatcher.queued < 2:
                await asyncio.sleep(0.01)
        for prompt in ("x", "y"):
            await it.client.post("/jobs", json={"modelInputs": {"prompt": prompt}})
        async with asyncio.timeout(20):
            while (found := await values(it))["jobs", ("later", "IN_QUEUE")] < 2:
                await asyncio.sleep(0.01)
        assert found["jobs", ("connection", "IN_PROGRESS")] == found["worker_jobs", ("cpu",)] == 4
        assert found["jobs", ("connection", "IN_QUEUE")] == 2
        assert found["jobs", ("later", "IN_PROGRESS")] == 0
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_nothing_that_clients_make_up_adds_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase + "0123456789-_.", k=12)).strip(".") + "x"

    async def send(it: Playing) -> None:
        method = rng.choice(["GET", "POST", "DELETE", word().upper().strip("-_.0123456789") or "X"])
        path = rng.choice(["", "/jobs", "/models", "/jobs/x/images"])
        await it.client.request(method, f"{path}/{word()}", params={word(): word()})
        await it.post(word(), {"MODEL_ID": f"{word()}/{word()}", "SCHEDULER": word()}, **{"x-request-id": word()})

    async with playing(tmp_path, monkeypatch, RUNTIME_DOWNLOADS="0") as it:
        for _ in range(60):
            await send(it)
        before = set(await values(it))
        for _ in range(500):
            await send(it)
        more = {key[0] for key in set(await values(it)) - before}
        # a code, a method or a route that chance had not brought yet
        assert more <= {f"http_request_seconds_{part}" for part in ("bucket", "count", "sum")} | {"http_requests_total"}
        assert len(before) < 1000
        assert len(await values(it)) < 1000


async def test_counters_of_workers_go_on_over_their_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with playing(tmp_path, monkeypatch) as it:
        (worker,) = it.service.dispatcher.workers
        worker._receive(Counted(some_counts(jobs=1)))
        worker._receive(Counted(some_counts()))  # counted since it started: not to be added to what it said before
        first = await values(it)
        monkeypatch.setattr(it.service.dispatcher, "_on_state", lambda worker: None)
        worker._ended()
        dead = await values(it)
        assert dead["batch_jobs_count", ("cpu", "UNet2DConditionModel.forward")] == 2
        it.played.start(worker)
        again = some_counts()
        again.calls["AutoencoderKL.decode"] = again.calls["UNet2DConditionModel.forward"]
        worker._receive(Counted(again))
        found = await values(it)
    call = "UNet2DConditionModel.forward"
    assert first["batch_jobs_bucket", ("cpu", "1.0", call)] == 1
    assert first["batch_jobs_bucket", ("cpu", "4.0", call)] == first["batch_jobs_count", ("cpu", call)] == 2
    assert found["batch_jobs_count", ("cpu", call)] == 4
    assert found["batch_jobs_count", ("cpu", "AutoencoderKL.decode")] == 2
    assert found["batch_rows_total", ("cpu", call)] == 20
    assert found["call_seconds_sum", ("cpu", call)] == pytest.approx(0.64)
    assert found["step_seconds_count", ("cpu", "StableDiffusionPipeline")] == 2
    assert found["switches_total", ("cpu",)] == 4
    assert found["evictions_total", ("cpu", "device")] == 6
    assert found["out_of_memory_total", ("evict", "cpu")] == 2
    counters = [key for key in first if key[0].endswith(("_total", "_count", "_bucket", "_sum"))]
    assert all(found[key] >= first[key] for key in counters if not key[0].startswith("process_"))


def test_counts_go_over_the_wire_and_are_added_up() -> None:
    told = Counted(some_counts(), DeviceMemory(1, 2, 3))
    assert parse_from_worker(frame(told)[4:]) == told
    both = plus(some_counts(), Counts(switches=1, evictions={"host": 1}))
    assert (both.switches, both.evictions) == (3, {"device": 3, "host": 1})
    assert both.calls == some_counts().calls
    assert plus(Counts(), some_counts()) == some_counts()


def test_an_engine_tells_apart_so_many_classes_and_no_more() -> None:
    tally = Tally()
    for number in range(1000):
        tally.call(f"Class{number}.forward", 1, 1, 0.1)
        stepped = tally.steps(f"Pipeline{number}")
        stepped()
        stepped()
    counts = tally.counts()
    assert OTHER in counts.calls
    assert OTHER in counts.steps
    assert len(counts.calls) == len(counts.steps) < 60
    assert sum(sum(calls.jobs.counts) for calls in counts.calls.values()) == 1000
    assert sum(sum(steps.counts) for steps in counts.steps.values()) == 1000


def test_what_is_told_does_not_change_any_more() -> None:
    tally = Tally()
    tally.call("A.forward", 1, 1, 0.1)
    told = tally.counts()
    tally.call("A.forward", 1, 1, 0.1)
    assert sum(told.calls["A.forward"].jobs.counts) == 1


def test_loading_a_model_is_no_call_of_a_module() -> None:
    tally = Tally()
    executor = Executor(tally=tally)
    executor.on_device(lambda: None)
    executor.exclusively(lambda: None)
    executor.close()
    assert tally.counts().calls == {}


def test_metrics_are_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.+) \|$", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}
    assert told == {family.exposed: (family.kind, family.labels, family.meaning) for family in FAMILIES.values()}


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    """And for every one of them."""
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    metrics = Service(Settings.from_env({})).watch.metrics
    assert metrics is not None
    text, _ = metrics.exposition("")
    there: dict[str, set[str]] = {}
    for family in parse(text.decode()):
        suffixes = ("_bucket", "_count", "_sum") if family.type == "histogram" else ("",)
        for suffix in suffixes:
            there[family.name + ("_total" if family.type == "counter" else "") + suffix] = set()
    named = {name for expr in asked for name in re.findall(r"\b(?:diffusers_api|process)_\w+", expr)}
    assert named <= set(there)
    unasked = {f.exposed for f in FAMILIES.values()} - {re.sub("_(bucket|count|sum)$", "", name) for name in named}
    assert unasked == set()
    labels = {label for family in FAMILIES.values() for label in family.labels} | {"le", "job", "instance"}
    grouped = {
        name.strip() for expr in asked for group in re.findall(r"by ?\(([^)]*)\)", expr) for name in group.split(",")
    }
    assert grouped <= labels


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert [v["type"] for v in board["templating"]["list"] if v["name"] == "datasource"] == ["datasource"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in panels(board):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"]
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))  # none lies over another
    assert max(x for x, _ in cells) < 24


def test_the_scrape_configuration_asks_the_route_that_there_is() -> None:
    config = yaml.safe_load((DASHBOARD.parent / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    assert scrape["metrics_path"] == "/metrics"
    assert scrape["authorization"]["type"] == "Bearer"
