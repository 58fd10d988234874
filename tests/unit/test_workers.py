"""The handle of a worker process, with stand-ins for the process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from api.errors import ApiError
from api.schema.generation import ModelRef
from api.schema.messages import Answer, Held, Load, Loaded, Memory, Ready, Unload, parse_to_worker
from api.service import memory, workers
from api.service.workers import Worker


class Watched:
    """A worker and what it reported."""

    def __init__(self, patience: float = 60) -> None:
        self.states: list[bool] = []
        self.worker = Worker(
            "cpu", patience, lambda worker, message: None, lambda worker: self.states.append(worker.ready)
        )


def started_as(code: str, monkeypatch: pytest.MonkeyPatch) -> list[asyncio.subprocess.Process]:
    """Have some Python run in place of the worker; the processes that are started."""
    real, started = asyncio.create_subprocess_exec, list[asyncio.subprocess.Process]()

    async def create(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        started.append(await real(args[0], "-c", code, args[3], **kwargs))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create)
    return started


def ref_of(model: str) -> ModelRef:
    return ModelRef(model, "r", "fp32", f"/{model}")


class Restored:
    """A worker without a process, that had ``a`` and ``b`` pinned and ``c`` on the device."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.worker = Worker("cpu", 1000, lambda worker, message: None, lambda worker: None)
        self.worker._write = lambda data: self.sent.append(parse_to_worker(data[4:]))  # type: ignore[method-assign]
        self.starts()
        self.has(a="device", b="host", c="")

    def starts(self) -> list[tuple[str, str, bool]]:
        """It is ready; what it is asked to bring back: model, tier, pinned."""
        self.sent.clear()
        self.worker._receive(Ready("cpu", "", {}, 0, 0, 1))
        assert all(isinstance(message, Load | Unload) for message in self.sent)
        loads = [message for message in self.sent if isinstance(message, Load)]
        return [(message.model.model_id, message.tier, message.pin) for message in loads]

    @property
    def unloads(self) -> list[tuple[str, str]]:
        return [(message.key, message.to) for message in self.sent if isinstance(message, Unload)]

    def answers(self, model: str, code: str = "") -> None:
        self.worker._receive(Answer(next(m.id for m in self.sent if m.model.model_id == model), code))

    def has(self, **pins: str) -> None:
        held = {ref_of(m).key: Held(ref_of(m), pin or "device", 1, 1, 0, pin, 0.0) for m, pin in pins.items()}
        self.worker._receive(Loaded(held, Memory(1, 1, 1, 1, 1)))

    def dies(self) -> None:
        self.worker._ended()


async def test_what_was_not_yet_brought_back_when_it_died_again_is_brought_back_by_the_next() -> None:
    it = Restored()
    it.dies()
    before = it.starts()
    assert before == [("b", "host", True), ("a", "device", True), ("c", "device", False)]
    it.has(a="", b="host")  # one is there and not pinned yet, of the last one nothing
    it.answers("b")
    it.dies()
    assert sorted(model.model_id for model in it.worker.pinned) == ["a", "b"]  # their folders stay on the volume
    assert sorted(it.starts()) == sorted(before)
    for model in "abc":
        it.answers(model)
    it.has(b="host")
    it.dies()
    assert it.starts() == [("b", "host", True)]  # what is back and unloaded since is not restored


async def test_what_it_dies_of_again_and_again_is_given_up_and_told(caplog: pytest.LogCaptureFixture) -> None:
    it = Restored()
    for _ in range(3):
        it.dies()
        assert len(it.starts()) == 3
    assert not caplog.records
    it.dies()
    assert it.starts() == []
    assert sorted(record.args[2] for record in caplog.records) == [ref_of(model).key for model in "abc"]


async def test_a_pin_that_no_longer_fits_is_told(caplog: pytest.LogCaptureFixture) -> None:
    it = Restored()
    it.dies()
    it.starts()
    it.answers("c", "OUT_OF_MEMORY")
    assert not caplog.records
    it.answers("a", "OUT_OF_MEMORY")
    assert ref_of("a").key in caplog.text
    it.answers("b")
    it.dies()
    assert it.starts() == []


async def test_what_is_unloaded_while_no_worker_lives_does_not_come_back() -> None:
    it = Restored()
    it.worker.warm(Load(ref_of("w")))
    it.dies()
    assert it.worker.forget(lambda ref: ref.model_id == "a", "disk") == {ref_of("a").key}
    assert it.worker.forget(lambda ref: ref.model_id == "w", "host") == set()
    assert [model for model, *_ in it.starts()] == ["b", "c"]
    assert it.unloads == [(ref_of("w").key, "host")]  # its loading cannot be kept from beginning
    it.dies()
    it.starts()
    assert it.unloads == []


@pytest.mark.parametrize("installed", [True, False])
async def test_what_is_being_brought_back_is_unloaded(installed: bool) -> None:
    """It is not in memory yet, so the worker has not told of it; nor of one that a client has it load."""
    it = Restored()
    it.dies()
    it.starts()
    there = SimpleNamespace(folder=ref_of("a").folder) if installed else None
    service = SimpleNamespace(
        dispatcher=SimpleNamespace(workers=[it.worker]),
        library=SimpleNamespace(find=lambda ref: there),
        settings=SimpleNamespace(request_timeout=20),
        source_ref=lambda options: SimpleNamespace(model_id=options["MODEL_ID"], revision=""),
        model_ref=lambda model, ref, options: ref_of(ref.model_id),
    )
    for again in (False, True):
        it.sent.clear()
        if again and not installed:
            with pytest.raises(ApiError, match="nothing of it is in memory"):
                await memory.unload(service, {"MODEL_ID": "a"})
            return
        unloading = asyncio.create_task(memory.unload(service, {"MODEL_ID": "a"}))
        await until(lambda: it.sent)
        assert it.unloads == [(ref_of("a").key, "disk")]
        it.worker._receive(Answer(it.sent[0].id))
        assert await unloading == []
        it.worker._receive(Answer(ref_of("a").key, "CANCELLED"))
        assert [model.model_id for model in it.worker.pinned] == ["b"]


async def test_who_waits_for_an_answer_is_told_that_the_server_shuts_down() -> None:
    it = Restored()
    asked = asyncio.create_task(it.worker.ask(Load(ref_of("d"), "1")))
    await asyncio.sleep(0)
    await it.worker.stop()
    later = await it.worker.ask(Load(ref_of("e"), "2"))
    assert (await asyncio.wait_for(asked, 20)).code == later.code == "NOT_READY"
    assert [message.id for message in it.sent] == ["1"]


async def until(condition: Any, seconds: float = 10) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


async def test_a_start_that_fails_in_this_process_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptors, no memory: the watch goes on, and the worker comes back."""
    real, faults = asyncio.create_subprocess_exec, [OSError(24, "Too many open files"), ValueError("odd"), None]

    async def create(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        if fault := faults.pop(0) if faults else None:
            raise fault
        return await real("sleep", "60", **{k: v for k, v in kwargs.items() if k != "env"})

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create)
    watched = Watched()
    watched.worker.start()
    await until(lambda: watched.worker.pid)
    assert watched.worker.restarts == 2
    await watched.worker.stop()


async def test_a_message_that_cannot_be_read_ends_the_process_not_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import socket,sys,time; socket.socket(fileno=int(sys.argv[1])).sendall(b'\\0\\0\\0\\1x'); time.sleep(60)"
    started = started_as(code, monkeypatch)
    watched = Watched()
    watched.worker.start()
    await until(lambda: len(started) >= 2)
    assert started[0].returncode is not None
    await watched.worker.stop()


async def test_it_is_defunct_while_it_does_not_start_and_no_longer_when_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from api.schema.messages import frame

    monkeypatch.setattr(workers, "_LONGEST_PAUSE", 0.05)
    ready = frame(Ready("cpu", "a CPU", {}, 2, 1, 2))
    good = f"import socket,sys,time; socket.socket(fileno=int(sys.argv[1])).sendall({ready!r}); time.sleep(60)"
    real, count = asyncio.create_subprocess_exec, 0

    async def create(*args: Any, **kwargs: Any) -> asyncio.subprocess.Process:
        nonlocal count
        count += 1
        return await real(args[0], "-c", good if count > 7 else "raise SystemExit(3)", args[3], **kwargs)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create)
    watched = Watched()
    watched.worker.start()
    await until(lambda: watched.worker.defunct)
    await until(lambda: watched.worker.ready)
    assert not watched.worker.defunct
    await watched.worker.stop()


@pytest.mark.parametrize("then", ["time.sleep(60)", "s.sendall(BUSY); time.sleep(60)"], ids=["silent", "hung"])
async def test_a_worker_that_hangs_is_killed_and_started_again(monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    from api.schema.messages import Alive, frame

    ready, busy = frame(Ready("cpu", "a CPU", {}, 2, 1, 2)), frame(Alive(5.0))
    code = (
        f"import socket,sys,time; s=socket.socket(fileno=int(sys.argv[1])); s.sendall({ready!r}); BUSY={busy!r}; {then}"
    )
    started = started_as(code, monkeypatch)
    watched = Watched(patience=0.5)
    watched.worker.start()
    await until(lambda: len(started) >= 2)
    assert started[0].returncode == -9
    assert watched.states[:2] == [True, False]
    await watched.worker.stop()


async def test_a_worker_that_hangs_before_it_is_ready_is_killed_and_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = started_as("import time; time.sleep(60)", monkeypatch)
    watched = Watched(patience=0.5)
    watched.worker.start()
    await until(lambda: len(started) >= 2)
    assert started[0].returncode == -9
    assert True not in watched.states
    await watched.worker.stop()


async def test_a_start_that_takes_long_and_says_so_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from api.schema.messages import Alive, frame

    alive = frame(Alive(0.1))
    code = f"import socket,sys,time; s=socket.socket(fileno=int(sys.argv[1]))\nwhile 1: s.sendall({alive!r}); time.sleep(.1)"
    started = started_as(code, monkeypatch)
    watched = Watched(patience=1.0)
    watched.worker.start()
    await asyncio.sleep(2.5)
    assert len(started) == 1
    await watched.worker.stop()


async def test_a_worker_that_gives_signs_of_life_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from api.schema.messages import Alive, frame

    ready, alive = frame(Ready("cpu", "a CPU", {}, 2, 1, 2)), frame(Alive(0.1))
    code = f"import socket,sys,time; s=socket.socket(fileno=int(sys.argv[1])); s.sendall({ready!r})\nwhile 1: s.sendall({alive!r}); time.sleep(.1)"
    started = started_as(code, monkeypatch)
    watched = Watched(patience=0.5)
    watched.worker.start()
    await asyncio.sleep(1.5)
    assert len(started) == 1
    assert watched.worker.ready
    await watched.worker.stop()


@pytest.mark.parametrize(
    ("end", "crashed"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", True),
        ("os.abort()", True),
        ("os._exit(70)", True),
        ("time.sleep(60)", True),  # and is killed for it
        ("os.kill(os.getpid(), signal.SIGKILL)", False),
        ("os._exit(1)", False),
    ],
)
async def test_what_a_worker_died_of(monkeypatch: pytest.MonkeyPatch, end: str, crashed: bool) -> None:
    from api.schema.messages import frame

    ready = frame(Ready("cpu", "a CPU", {}, 2, 1, 2))
    code = f"import os,signal,socket,sys,time; socket.socket(fileno=int(sys.argv[1])).sendall({ready!r}); {end}"
    started_as(code, monkeypatch)
    deaths: list[bool] = []
    watched = Watched(patience=2.0)
    watched.worker._on_state = lambda worker: None if worker.ready else deaths.append(worker.crashed)
    watched.worker.start()
    await until(lambda: deaths)
    assert deaths[0] is crashed
    await watched.worker.stop()
