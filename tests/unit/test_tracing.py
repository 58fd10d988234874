"""Traces of requests, through a server whose workers are played, to an exporter in memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from api.errors import ApiError
from api.schema.transfers import Transfer
from api.service import service as services
from api.service.tracing import Tracing, open_tracing
from api.service.upload import upload
from tests.playing import Playing, playing
from tests.running import ROOT

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROMPT = "a prompt that nobody is to read"


class Traced:
    """A server whose spans are kept."""

    def __init__(self, it: Playing) -> None:
        self.it = it
        self.spans = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        it.service.watch.tracing = Tracing(provider)

    async def ended(self, name: str) -> list[ReadableSpan]:
        """Every span there is, once one of that name has ended."""
        async with asyncio.timeout(20):
            while not any(span.name == name for span in self.spans.get_finished_spans()):
                await asyncio.sleep(0.01)
        found = list(self.spans.get_finished_spans())
        self.spans.clear()
        return sorted(found, key=lambda span: span.start_time or 0)


@pytest.fixture
async def traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Traced]:
    async with playing(tmp_path, monkeypatch) as it:
        yield Traced(it)


def tree(spans: list[ReadableSpan]) -> dict[str, str]:
    """The parent of every span, by their names (a queue's with which one it is)."""
    named = {span.context.span_id: title(span) for span in spans if span.context}
    return {title(span): named.get(span.parent.span_id, "?") if span.parent else "" for span in spans}


def title(span: ReadableSpan) -> str:
    which = (span.attributes or {}).get("diffusers.queue")
    return f"{span.name} {which}" if which else span.name


async def test_a_request_is_one_tree(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    admit = traced.it.service._admission.admit

    async def fetching(*arguments: Any) -> Any:
        for kind in ("download", "extract", "convert"):
            for status in ("start", "done"):
                arguments[3](Transfer("org/name", kind, status, 10, 10, 0, None))
        return await admit(*arguments)

    monkeypatch.setattr(traced.it.service._admission, "admit", fetching)
    answer = await traced.it.post(PROMPT)
    assert answer.status_code == 200
    spans = await traced.ended("POST /")
    assert tree(spans) == {
        "POST /": "",
        "admission": "POST /",
        "download": "admission",
        "extract": "admission",
        "convert": "admission",
        "queue worker": "POST /",
        "load": "POST /",
        "inference": "POST /",
        "encode": "POST /",
    }
    assert len({span.context.trace_id for span in spans if span.context}) == 1
    by_name = {span.name: span for span in spans}
    assert [span.name for span in spans if span.name in ("queue", "load", "inference", "encode")] == [
        "queue", "load", "inference", "encode",
    ]  # fmt: skip
    root, inference = by_name["POST /"], by_name["inference"]
    assert root.kind == SpanKind.SERVER
    assert root.attributes is not None
    assert root.attributes["http.route"] == "/"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["diffusers.id"] == answer.headers["x-request-id"]
    assert dict(inference.attributes or {}) == {
        "diffusers.model": "demo/shapes",
        "diffusers.pipeline": "StableDiffusionPipeline",
        "diffusers.scheduler": "DPMSolverMultistepScheduler",
        "diffusers.images": 1,
        "diffusers.num_inference_steps": 2,
    } | {f"diffusers.{side}": 64 for side in ("width", "height")}
    assert by_name["download"].attributes == {"diffusers.model": "org/name", "diffusers.bytes": 10}
    assert all(span.start_time and span.end_time and span.start_time <= span.end_time for span in spans)
    assert PROMPT not in "".join(span.to_json() for span in spans)


async def test_a_trace_that_a_client_began_goes_on(traced: Traced) -> None:
    await traced.it.post("x", traceparent=f"00-{TRACE}-{PARENT}-01")
    spans = await traced.ended("POST /")
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {TRACE}
    root = next(span for span in spans if span.name == "POST /")
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT
    await traced.it.post("y", traceparent="00-garbage")
    (other,) = [span for span in await traced.ended("POST /") if span.name == "POST /"]
    assert other.parent is None


async def test_who_only_asks_how_it_is_is_not_traced(traced: Traced) -> None:
    for path in ("/ping", "/health/live", "/health/ready", "/healthcheck", "/metrics", "/schedulers"):
        await traced.it.client.get(path)
    assert [span.name for span in await traced.ended("GET /schedulers")] == ["GET /schedulers"]


async def test_a_stream_lasts_to_its_last_line(traced: Traced) -> None:
    await traced.it.post("x", {"streamEvents": True})
    spans = await traced.ended("POST /")
    assert tree(spans)["inference"] == tree(spans)["admission"] == "POST /"
    ends = {span.name: span.end_time or 0 for span in spans}
    assert ends["POST /"] >= ends["encode"]


async def test_a_job_for_later_belongs_to_the_request_that_brought_it(traced: Traced) -> None:
    sent = await traced.it.client.post(
        "/jobs", json={"modelInputs": {"prompt": PROMPT}}, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}
    )
    job_id = sent.json()["id"]
    await traced.it.until_over(job_id)
    traced.it.service.watch.webhook(job_id, 0.2, arrived=True)
    spans = await traced.ended("webhook")
    ours = [span for span in spans if span.context and f"{span.context.trace_id:032x}" == TRACE]
    assert tree(ours) == {
        "POST /jobs": "?",
        "job": "POST /jobs",
        "queue store": "job",
        "admission": "job",
        "queue worker": "job",
        "load": "job",
        "inference": "job",
        "encode": "job",
        "webhook": "job",
    }
    assert not any(span.name in tree(ours) for span in spans if span not in ours)
    job = next(span for span in ours if span.name == "job")
    assert (job.attributes or {})["diffusers.job"] == job_id
    sent_webhook = next(span for span in ours if span.name == "webhook")
    assert (sent_webhook.end_time or 0) - (sent_webhook.start_time or 0) >= 0.2e9


async def test_webhooks_of_a_request_that_waits_belong_to_it(traced: Traced) -> None:
    watch = traced.it.service.watch
    admit = traced.it.service._admission.admit

    async def hooking(*arguments: Any) -> Any:
        watch.hooked("a hook")
        return await admit(*arguments)

    traced.it.service._admission.admit = hooking  # type: ignore[method-assign]
    await traced.it.post()
    watch.webhook("a hook", 0.1, arrived=False, attempt=2)
    spans = await traced.ended("webhook")
    assert tree(spans)["webhook"] == "admission"
    (sent,) = [span for span in spans if span.name == "webhook"]
    assert (sent.attributes or {})["diffusers.attempt"] == 2
    assert sent.status.status_code == StatusCode.ERROR


async def test_a_request_that_came_another_way_than_http_has_a_tree_of_its_own(traced: Traced) -> None:
    service = traced.it.service
    admitted = await service.admit("r", {"prompt": "x", "num_inference_steps": 2}, {})
    traced.spans.clear()
    await service.finish(service.submit(admitted))
    spans = await traced.ended("job")
    assert tree(spans) == {"job": "", "queue worker": "job", "load": "job", "inference": "job", "encode": "job"}


async def test_a_job_whose_request_is_not_known_has_a_tree_of_its_own(traced: Traced) -> None:
    """As after a restart."""
    tracing = traced.it.service.watch.tracing
    assert tracing is not None
    tracing.accepted = lambda job_id: None  # type: ignore[method-assign]
    sent = await traced.it.client.post("/jobs", json={"modelInputs": {"prompt": "x"}})
    await traced.it.until_over(sent.json()["id"])
    spans = await traced.ended("job")
    assert {name: parent for name, parent in tree(spans).items() if "jobs" not in name} == {
        "job": "", "admission": "job", "queue worker": "job", "load": "job", "inference": "job", "encode": "job",
    }  # fmt: skip


async def test_a_job_that_is_cancelled_before_its_turn_ends_its_span(traced: Traced) -> None:
    traced.it.service.later.close()  # nothing begins any more
    sent = await traced.it.client.post("/jobs", json={"modelInputs": {"prompt": "x"}})
    await traced.it.client.delete(f"/jobs/{sent.json()['id']}")
    spans = await traced.ended("job")
    assert tree(spans)["job"] == "POST /jobs"
    job = next(span for span in spans if span.name == "job")
    assert (job.attributes or {})["error.type"] == "CANCELLED"


async def test_what_fails_says_so_where_it_failed(traced: Traced) -> None:
    traced.it.played.fails.add("bad")
    await traced.it.post("bad")
    failed = {span.name: span for span in await traced.ended("POST /")}
    assert (failed["inference"].attributes or {})["error.type"] == "PIPELINE_ERROR"
    assert failed["inference"].status.status_code == StatusCode.ERROR
    assert (failed["POST /"].attributes or {})["diffusers.error"] == "PIPELINE_ERROR"
    assert failed["POST /"].status.status_code == StatusCode.UNSET  # it is the client's
    await traced.it.post("x", {"MODEL_ID": "/"})
    refused = {span.name: span for span in await traced.ended("POST /")}
    assert set(refused) == {"POST /", "admission"}
    assert refused["admission"].status.status_code == StatusCode.ERROR


async def test_uploads_are_in_the_tree(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(*arguments: Any) -> list[str]:
        raise ApiError("UPLOAD_FAILED", "no")

    monkeypatch.setattr(services, "upload", failing)
    assert services.upload is not upload
    address = "http://93.184.216.34/x?X-Amz-Signature=abcdef"
    answer = await traced.it.post("x", {"output_url": address})
    assert answer.status_code == 502
    spans = await traced.ended("POST /")
    assert tree(spans)["upload"] == "POST /"
    assert "abcdef" not in "".join(span.to_json() for span in spans)


async def test_a_model_that_is_named_by_its_address_keeps_it_to_itself(traced: Traced) -> None:
    tracing = traced.it.service.watch.tracing
    assert tracing is not None
    with tracing.admission(None) as told:
        told(Transfer("https://me:pass@host/model", "download", "start", 0, None, 0, None))
    spans = await traced.ended("admission")
    assert [span.name for span in spans] == ["admission", "download"]  # it ends with what waited for it
    assert "pass" not in "".join(span.to_json() for span in spans)


@pytest.mark.parametrize("environ", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}])
def test_nothing_is_traced_unless_there_is_a_collector(environ: dict[str, str]) -> None:
    assert open_tracing(environ) is None


def test_without_a_collector_nothing_of_it_is_imported() -> None:
    code = "import sys, api.cli.serve; from api.service.service import Service; from api.settings import Settings;"
    code += "Service(Settings.from_env({})); print([name for name in sys.modules if name.startswith('opentelemetry')])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_collector_without_the_packages_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}) is None
    assert "diffusers-api[otel]" in caplog.text


async def test_with_a_collector_spans_are_sent_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the SDK reads its own variables."""
    asked: list[str] = []
    came = asyncio.Event()

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline()).decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        came.set()

    server = await asyncio.start_server(collect, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    tracing = open_tracing()
    assert tracing is not None
    with tracing.span("x"):
        pass
    await tracing.close()
    await asyncio.wait_for(came.wait(), 20)
    assert asked == ["POST /v1/traces HTTP/1.1\r\n"]
    server.close()
