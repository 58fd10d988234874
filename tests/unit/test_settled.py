"""Which attention is the fastest is settled once: by measurement, for one device and versions, for all workers."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import threading
import time
from pathlib import Path

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from api.engine import settled
from api.engine.device import Device
from api.engine.settled import CANDIDATES, FILE, SHAPES, fastest, kept_or, settle
from api.models.locks import FileLock
from api.schema.attention import ATTENTIONS, LOSSY, NATIVE

ABOUT = {"device": "a card", "capability": "9.0", "dtype": "torch.bfloat16"}
NOW = {"torch": "2.13.0", "diffusers": "0.40.0"}


@pytest.fixture(autouse=True)
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, "missing", lambda name: None)


class Clock:
    """What backends take at each shape."""

    def __init__(self, **spent: float) -> None:
        self.spent = {NATIVE: 1.0, **spent}
        self.asked: list[str] = []

    def __call__(self, name: str, shape: tuple[int, ...]) -> float:
        self.asked.append(name)
        return self.spent.get(name, 2.0)


def usable(name: str) -> bool:
    return True


def never() -> str:
    raise AssertionError("it was settled already")


# --- the choice ---


def test_nothing_lossy_is_ever_a_candidate() -> None:
    assert not LOSSY & set(CANDIDATES)
    assert set(CANDIDATES) < set(ATTENTIONS)


def test_another_has_to_win_clearly() -> None:
    assert fastest(usable, Clock(flash=0.96)) == NATIVE
    assert fastest(usable, Clock(flash=0.94)) == "flash"
    assert fastest(usable, Clock(flash=0.90, _native_cudnn=0.89)) == "_native_cudnn"


def test_the_sum_over_all_shapes_counts() -> None:
    def measure(name: str, shape: tuple[int, ...]) -> float:
        large = shape == SHAPES[-1]
        return {NATIVE: 10.0 if large else 1.0, "flash": 4.0 if large else 1.5, "xformers": 16.0 if large else 0.1}.get(
            name, 99.0
        )

    assert fastest(usable, measure) == "flash"


def test_what_cannot_be_used_or_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(flash=0.1, xformers=0.2, _native_cudnn=0.3, _native_flash=0.4)
    assert fastest(lambda name: name != "flash", clock) == "xformers"
    monkeypatch.setattr(settled, "missing", lambda name: "absent" if name == "xformers" else None)

    def measure(name: str, shape: tuple[int, ...]) -> float:
        if name == "_native_cudnn" and shape == SHAPES[3]:
            raise RuntimeError("no operator")
        return clock(name, shape)

    assert fastest(lambda name: name != "flash", measure) == "_native_flash"


def test_what_there_was_no_time_to_measure_does_not_win() -> None:
    clock = Clock(_native_cudnn=0.1, flash=0.01)

    def measure(name: str, shape: tuple[int, ...]) -> float:
        if name == "_native_flash":
            time.sleep(0.02)  # ends beyond the limit in the midst of it
        return clock(name, shape)

    assert fastest(usable, measure, limit=0.05) == "_native_cudnn"
    assert "flash" not in clock.asked
    assert fastest(usable, Clock(flash=0.01), limit=-1) == NATIVE


# --- kept ---


def test_it_is_kept(tmp_path: Path) -> None:
    assert kept_or(tmp_path / "new", ABOUT, NOW, lambda: "flash") == "flash"
    assert kept_or(tmp_path / "new", ABOUT, NOW, never) == "flash"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {FILE, f"{FILE}.lock"}


@pytest.mark.parametrize("name", ABOUT)
def test_another_device_is_settled_by_itself(name: str, tmp_path: Path) -> None:
    kept_or(tmp_path, ABOUT, NOW, lambda: "flash")
    assert kept_or(tmp_path, {**ABOUT, name: "other"}, NOW, lambda: "xformers") == "xformers"
    assert kept_or(tmp_path, ABOUT, NOW, never) == "flash"


@pytest.mark.parametrize("now", [{**NOW, "torch": "2.14.0"}, {**NOW, "xformers": "0.0.35"}])
def test_other_versions_settle_it_anew_and_a_change_is_logged(
    now: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept_or(tmp_path, ABOUT, NOW, lambda: "flash")
    with caplog.at_level(logging.WARNING, "api.engine"):
        assert kept_or(tmp_path, ABOUT, now, lambda: "flash") == "flash"
        assert not caplog.records, "the same as before"
        assert kept_or(tmp_path, ABOUT, {**now, "diffusers": "0.41.0"}, lambda: NATIVE) == NATIVE
    (record,) = caplog.records
    assert "is sdpa with" in record.getMessage() and "was flash with" in record.getMessage()
    assert kept_or(tmp_path, ABOUT, NOW, never) == "flash"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"7", b"[7, {}]", json.dumps([{**ABOUT, "versions": NOW, "attention": "sage"}]).encode(),
     json.dumps([{**ABOUT, "versions": 7, "attention": "flash"}]).encode()],
)  # fmt: skip
def test_a_broken_file_is_written_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert kept_or(tmp_path, ABOUT, NOW, lambda: "xformers") == "xformers"
    assert kept_or(tmp_path, ABOUT, NOW, never) == "xformers"


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    for number in range(70):
        kept_or(tmp_path, ABOUT, {"torch": str(number)}, lambda: NATIVE)
    assert len(json.loads((tmp_path / FILE).read_bytes())) == 64


def test_two_workers_at_once_settle_the_same(tmp_path: Path) -> None:
    together, choices = threading.Barrier(4), iter(["flash", "xformers", "_native_flash", NATIVE])

    def begin(_: int) -> str:
        together.wait()
        return kept_or(tmp_path, ABOUT, NOW, lambda: next(choices))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(begin, range(4))) == {"flash"}


def test_a_worker_that_hangs_does_not_hold_up_the_next(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / f"{FILE}.lock")
    lock.acquire()
    with pytest.raises(TimeoutError):
        kept_or(tmp_path, ABOUT, NOW, never, wait=0.1)
    lock.release()
    assert kept_or(tmp_path, ABOUT, NOW, lambda: "flash") == "flash"


# --- at the start ---


class Card(Device):
    """A GPU, as far as is asked for here."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.is_cuda = True

    @property
    def name(self) -> str:
        return "a card"

    def release_cache(self) -> None: ...


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(settled, "usable_for", lambda *args, **more: True)
    clock = Clock(xformers=0.5)
    monkeypatch.setattr(settled, "seconds", lambda device, dtype, name, shape: clock(name, shape))
    return Card()


def test_half_precision_has_it_and_fp32_has_torchs_own(card: Card, tmp_path: Path) -> None:
    assert {str(k): v for k, v in settle(card, tmp_path).items()} == {
        "torch.float16": "xformers", "torch.bfloat16": "xformers",
    }  # fmt: skip
    (entry,) = json.loads((tmp_path / FILE).read_bytes())
    assert entry["device"] == "a card" and entry["capability"] == "9.0" and "torch" in entry["versions"]


def test_compiled_code_has_torchs_own(card: Card, tmp_path: Path) -> None:
    assert settle(card, tmp_path, compiles=True) == {}
    assert list(tmp_path.iterdir()) == []
    assert settle(card, tmp_path) != {}


def test_a_cpu_has_nothing_to_settle(tmp_path: Path) -> None:
    assert settle(Device("cpu"), tmp_path) == {}
    assert not any(tmp_path.iterdir())


def test_no_start_fails_by_it(
    card: Card, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be kept could be another at the next start: it is torch's own then."""
    (tmp_path / "file").touch()
    assert settle(card, tmp_path / "file" / "below") == {}
    if os.getuid():
        tmp_path.chmod(0o500)
        assert settle(card, tmp_path) == {}
        tmp_path.chmod(0o700)

    def lost(*args: object) -> float:
        raise RuntimeError("CUDA error")

    seconds = settled.seconds
    monkeypatch.setattr(settled, "seconds", lost)
    assert settle(card, tmp_path) == {}
    assert "could not be settled" in caplog.text
    monkeypatch.setattr(settled, "seconds", seconds)
    assert settle(card, tmp_path) == {}, "what may have killed a worker is not tried again"
    (tmp_path / FILE).unlink()
    assert settle(card, tmp_path)


def test_the_libraries_own_variable_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName._NATIVE_MATH)
    settle(Device("cpu"), tmp_path)
    assert _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE
    assert "DIFFUSERS_ATTN_BACKEND" in caplog.text
