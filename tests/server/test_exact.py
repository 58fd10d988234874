"""Exactness under load: whatever runs beside it, a request gets the image that it gets alone."""

from __future__ import annotations

import io
import random
import threading
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from api.engine.budgets import Budgets
from api.engine.calls import Cancelled
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.loader import PartLoader
from api.engine.parts import HostPart, PartSpec
from api.schema.generation import GenerationRequest, ModelRef, Picture
from tests.generating import a_request
from tests.running import ROOT, Server, images_of, running
from tests.soak import Differences, Order, draw_order, memory_of, shared_out, size_of, threads_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

REQUESTS = size_of("SOAK_REQUESTS", 300)
SEED = size_of("SOAK_SEED", 0)
MODELS = ("demo/shapes", "demo/shapes", "tiny/a", "tiny/b")
TOLERANCE = 1
"""Levels of 255, float32: kernels sum in another order for another number of rows."""
TOLERANCE_64 = 1e-9
"""Of images in [0, 1], float64."""
MEMORY = 64
"""MB by which a process may have grown: the allocator's, not something for each request."""


def drawn(rng: random.Random, count: int) -> tuple[list[Order], list[Order]]:
    """Requests that all differ, and a sequence of them in which each comes twice on average."""
    distinct = [draw_order(rng, MODELS) for _ in range(count // 2)]
    orders = distinct + rng.choices(distinct, k=count - len(distinct))
    rng.shuffle(orders)
    return distinct, orders


def ask(http: httpx.Client, order: Order, patience: float | None = None) -> list[np.ndarray]:
    """Images of a request; a client without patience hangs up."""
    response = http.post("/", json=order.body, timeout=httpx.Timeout(300, read=patience or 300))
    assert response.status_code == 200, f"{response.text[:500]} for {str(order)[:300]}"
    return images_of(response.json())


class Clients:
    """What clients have seen, and what became of the server's processes.

    Args:
        alone: the images of each request, made while nothing else ran.
        count: how many requests there will be.
    """

    def __init__(self, server: Server, alone: dict[str, list[np.ndarray]], count: int, rng: random.Random) -> None:
        self.differences, self.wrong, self.left, self.done = Differences(), list[Order](), 0, 0
        self.states: list[tuple[float, float, int]] = []
        self._server, self._alone, self._count, self._rng = server, alone, count, rng
        self._worker = server.worker_pids()[0]
        self._lock = threading.Lock()

    def state(self) -> tuple[float, float, int]:
        """MB of the worker and of the HTTP process, threads of the worker."""
        return memory_of(self._worker), memory_of(self._server.process.pid), threads_of(self._worker)

    def run(self, order: Order) -> None:
        with self._lock:
            hangs_up, patience = self._rng.random() < 0.15, self._rng.uniform(0.01, 1.0)
        with httpx.Client(base_url=self._server.url) as http:
            if hangs_up:
                try:
                    self._compare(order, ask(http, order, patience))
                except httpx.TimeoutException:
                    self.left += 1
        with httpx.Client(base_url=self._server.url) as http:
            self._compare(order, ask(http, order))

    def _compare(self, order: Order, images: list[np.ndarray]) -> None:
        with self._lock:
            if self.differences.note(order, images, self._alone[order.key]) > TOLERANCE:
                self.wrong.append(order)
            self.done += 1
            if self.done * 10 >= self._count * (len(self.states) + 1):
                self.states.append(self.state())


def wait_idle(server: Server) -> None:
    deadline = time.monotonic() + 30
    while (now := server.client.get("/health/ready").json())["queue"] or now["workers"][0]["busy"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


def idle_state(clients: Clients) -> tuple[float, float, int]:
    """The state once an idle worker has given back what its heap need not keep, which it does after a few seconds."""
    states = []
    for _ in range(10):
        time.sleep(1)
        states.append(clients.state())
    return min(states)


def test_every_image_under_load_is_the_one_made_alone(models_dir: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    distinct, orders = drawn(rng, REQUESTS)
    with running(
        {"MODELS_DIR": str(models_dir), "RUNTIME_DOWNLOADS": "0", "OMP_NUM_THREADS": "1"}, tmp_path / "server.log"
    ) as server:
        pids = server.worker_pids()
        began = time.monotonic()
        alone = {order.key: ask(server.client, order) for order in distinct}
        one_by_one = time.monotonic() - began
        clients = Clients(server, alone, len(orders), random.Random(SEED))
        began = time.monotonic()
        shared_out(rng, orders, clients.run, warm_up=max(32, len(orders) // 10))
        took = time.monotonic() - began
        wait_idle(server)
        early, end = clients.states[0], idle_state(clients)
        assert server.worker_pids() == pids
    print(f"\n{len(distinct)} requests one by one: {one_by_one:.0f} s")
    print(f"{clients.done} at once, beside {clients.left} whose client hung up: {took:.0f} s")
    print(f"{clients.differences}\nMB of worker, of server, threads after each tenth: {clients.states}, {end}")
    assert clients.wrong == []
    assert clients.left > 0
    assert end[2] <= early[2]
    assert end[0] - early[0] < MEMORY
    assert end[1] - early[1] < MEMORY


# --- the same without HTTP, in float64: what is left of a difference is no rounding ---


class Device64(Device):
    """Computes in float64."""

    def dtype(self, precision: str) -> torch.dtype:
        return torch.float64


class CountingLoader(PartLoader):
    """Counts the parts that it reads."""

    reads = 0

    def read(self, spec: PartSpec) -> HostPart:
        self.reads += 1
        return super().read(spec)


def picture(data: str) -> Picture:
    image = Image.open(io.BytesIO(b64decode(data))).convert("RGB")
    return Picture("RGB", image.width, image.height, image.tobytes(), "")


def as_request(order: Order, number: int, folders: dict[str, Path]) -> GenerationRequest:
    """What admission would make of it."""
    inputs = dict(order.model_inputs)
    pictures = {name: picture(inputs.pop(name)) for name in ("image", "mask_image") if name in inputs}
    seed, model = inputs.pop("seed"), order.call_inputs["MODEL_ID"]
    if order.kind == "inpaint":
        inputs["width"] = inputs["height"] = pictures["image"].width
    suffix = {"txt2img": "", "img2img": "Img2Img", "inpaint": "Inpaint"}[order.kind]
    ref, pipeline = ModelRef(model, "soak", "fp32", str(folders[model])), f"StableDiffusion{suffix}Pipeline"
    more = {"pictures": pictures, "seed": seed, "safety_checker": True}
    return a_request(str(number), ref, pipeline, order.scheduler, inputs, **more)


@pytest.fixture
def engine64(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine in float64 that gives images as they are, with room for the demo model or the tiny ones."""
    monkeypatch.setattr("api.engine.run.to_uint8", lambda images: images.numpy())
    device = Device64("cpu")
    engine = Engine(device, Budgets(2**40, 2**40, shared=True), CountingLoader(device))
    yield engine
    engine.close()


def test_in_float64_nothing_is_left_of_a_difference(engine64: Engine, models_dir: Path) -> None:
    rng = random.Random(SEED + 1)
    distinct, orders = drawn(rng, max(40, REQUESTS // 8))
    folders = {"demo/shapes": ROOT / "models" / "shapes"}
    folders |= {name: models_dir / name.replace("/", "--") for name in ("tiny/a", "tiny/b")}
    loader = engine64.cache.loader
    assert isinstance(loader, CountingLoader)
    alone = {order.key: engine64.generate(as_request(order, 0, folders)).images for order in distinct}
    sizes = engine64.cache.sizes()
    engine64.cache.clear_idle()
    # whatever is asked for next, something has to go
    tiers = engine64.cache.tiers
    tiers._books.device_limit = tiers._books.host_limit = max(sizes.values()) + min(sizes.values()) // 2
    tiers.peak = loader.reads = 0
    before = engine64.executor.calls, engine64.executor.runs
    differences, cancelled, lock, numbers = Differences(), [0], threading.Lock(), iter(range(1, 10**9))

    def run(order: Order) -> None:
        with lock:
            until, number = rng.uniform(0.05, 3.0) + time.monotonic(), next(numbers)
            leaves = rng.random() < 0.15
        request = as_request(order, number, folders)
        try:
            out = engine64.generate(request, cancelled=lambda: leaves and time.monotonic() > until)
        except Cancelled:
            cancelled[0] += 1
            return
        with lock:
            differences.note(order, out.images, alone[order.key])

    threads = threading.active_count()
    shared_out(rng, orders, run, most=16)
    calls, runs = engine64.executor.calls - before[0], engine64.executor.runs - before[1]
    print(
        f"\n{len(orders)} requests, {cancelled[0]} cancelled, {loader.reads} parts read; {calls} calls in {runs} runs"
    )
    print(differences)
    assert max(differences.worst.values()) <= TOLERANCE_64
    assert differences.images > len(orders) // 2
    assert runs < calls
    assert loader.reads > 9
    assert tiers.peak <= tiers.device_limit
    assert threading.active_count() == threads
