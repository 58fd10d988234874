"""Upscalers in the engine: what spandrel makes of a picture, whole and in pieces, beside other jobs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from api.engine.budgets import Budgets
from api.engine.calls import Cancelled
from api.engine.device import Device
from api.engine.generate import Engine
from api.engine.spandrel_import import import_spandrel
from api.engine.tiling import spread
from api.engine.upscale import Order
from api.engine.upscalers import kind_of
from api.errors import ApiError
from api.schema.flows import Handover
from api.schema.generation import GenerationRequest, ModelRef, Picture
from tests import upscalers
from tests.generating import a_request
from tests.tiny import save_tiny
from tests.upscalers import a_picture, plainly, ref_of, upscale_by


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("upscalers")
    made = {
        "esrgan": upscalers.esrgan(),
        "unshuffling": upscalers.esrgan(1, shuffle_factor=2),
        "compact": upscalers.compact(),
        "grey": upscalers.compact(2, channels=1),
        "repeating": upscalers.repeating(),
    }
    return {name: upscalers.save(net, root / f"{name}.safetensors") for name, net in made.items()}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = Engine(Device("cpu"))
    yield made
    made.close()


def larger(engine: Engine, pictures: np.ndarray, path: Path, **how: Any) -> np.ndarray:
    return engine.upscaling.run(pictures[None] if pictures.ndim == 3 else pictures, Order(upscale_by(path, **how)))[0]


def told(engine: Engine, picture: np.ndarray, path: Path, **how: Any) -> dict[str, Any]:
    return engine.upscaling.run(picture[None], Order(upscale_by(path, **how)))[1]


def apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def extra(path: Path, picture: np.ndarray, **more: Any) -> GenerationRequest:
    """A request of ``use_extra: "upsample"``."""
    height, width = picture.shape[:2]
    sent = Picture("RGB", width, height, picture.tobytes(), "")
    upscale = upscale_by(path, **more)
    return a_request("x", upscale.model, "", "", {}, pictures={"image": sent}, upscale=upscale, extra="upsample")


@pytest.mark.parametrize("name", ["esrgan", "unshuffling", "compact", "repeating"])
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (9, 150)])
def test_a_picture_in_one_piece_is_what_spandrel_makes(
    engine: Engine, files: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    picture = a_picture(*size)
    plain = plainly(files[name], picture)
    assert plain.std() > 5  # a picture, not one colour
    assert np.array_equal(larger(engine, picture, files[name])[0], plain)


@pytest.mark.parametrize("name", ["compact", "esrgan", "unshuffling", "repeating"])
@pytest.mark.parametrize("size", [(70, 130), (97, 64)])
def test_pieces_make_what_the_whole_does(
    engine: Engine, files: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    picture = a_picture(*size)
    made = larger(engine, picture, files[name], tile=80)[0]
    pieces = told(engine, picture, files[name], tile=80)["upscaler"]["pieces"]
    assert pieces[0] * pieces[1] > 1
    # in float32 kernels sum in another order for another size: a value at the edge of two levels may fall either way
    assert apart(made, plainly(files[name], picture)) <= 1


def test_pieces_without_what_they_overlap_would_differ(
    engine: Engine, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.engine.tiling.MARGIN", 0)
    monkeypatch.setattr("api.engine.tiling.BLEND", 1)
    monkeypatch.setattr("api.engine.tiling.OVERLAP", 1)
    picture = a_picture(70, 130)
    assert apart(larger(engine, picture, files["esrgan"], tile=80)[0], plainly(files["esrgan"], picture)) > 3


def test_pieces_cover_all_of_a_side() -> None:
    for whole, tile, step, least in ((120, 57, 8, 100), (120, 64, 1, 0), (200, 64, 4, 50), (144, 57, 16, 72)):
        pieces = spread(whole, tile, step, least)
        counts = torch.zeros(whole)
        for start in pieces.starts:
            counts[start : start + pieces.size] += pieces.weights(start, 1)
        assert (counts > 0).all()
        assert pieces.size % step == 0


def test_opacity_and_grey_and_several_images(engine: Engine, files: dict[str, Path]) -> None:
    picture, opacity = a_picture(40, 52), a_picture(40, 52, 1, seed=3)
    made = larger(engine, np.concatenate([picture, opacity], 2), files["compact"])[0]
    assert np.array_equal(made[:, :, :3], plainly(files["compact"], picture))
    resized = Image.fromarray(opacity[:, :, 0]).resize((104, 80), Image.Resampling.LANCZOS)
    assert np.array_equal(made[:, :, 3], np.asarray(resized))
    # an upscaler of grey pictures gets each colour by itself
    each = [plainly(files["grey"], picture[:, :, c : c + 1]) for c in range(3)]
    assert np.array_equal(larger(engine, picture, files["grey"])[0], np.concatenate(each, 2))
    grey = larger(engine, opacity, files["compact"])[0]
    assert np.array_equal(grey, plainly(files["compact"], opacity.repeat(3, 2)))
    several = np.stack([a_picture(40, 52, seed=n) for n in range(3)])
    made = larger(engine, several, files["compact"])
    assert all(np.array_equal(made[n], plainly(files["compact"], several[n])) for n in range(3))


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 4.0, 6.0])
def test_another_scale_is_resized_from_its_own(engine: Engine, files: dict[str, Path], scale: float) -> None:
    picture = a_picture(30, 41)
    made, said = engine.upscaling.run(picture[None], Order(upscale_by(files["esrgan"], scale=scale)))
    own = Image.fromarray(plainly(files["esrgan"], picture))
    size = round(41 * scale), round(30 * scale)
    wanted = own if scale == 4 else own.resize(size, Image.Resampling.LANCZOS)
    assert np.array_equal(made[0], np.asarray(wanted))
    assert said["upscaler"]["resized"] == (None if scale == 4 else "lanczos")
    assert said["upscale"] == {
        "model": "tiny/esrgan.safetensors",
        "sha256": ref_of(files["esrgan"]).revision,
        "scale": scale,
        "tile": 256,
    }


def test_a_request_for_it_alone(engine: Engine, files: dict[str, Path]) -> None:
    engine.cache.clear_idle()
    picture, phases, steps = a_picture(150, 100), list[tuple[str, str]](), list[tuple[int, int]]()
    made = engine.generate(
        extra(files["compact"], picture, tile=80),
        on_step=lambda *step: steps.append(step),
        on_phase=lambda *phase: phases.append(phase),
    )
    assert apart(made.images[0], plainly(files["compact"], picture)) <= 1
    wide, high = made.meta["upscaler"]["pieces"]
    assert steps == [(n + 1, wide * high) for n in range(wide * high)]
    assert phases[-2:] == [("inference", "start"), ("inference", "done")]
    assert made.meta["numerics"] == "cpu/float32/none/eager"
    assert made.timings["inference"] >= 0
    # loaded once
    assert "loadModel" not in engine.generate(extra(files["compact"], picture)).timings


def test_it_takes_what_its_header_says(engine: Engine, files: dict[str, Path]) -> None:
    for name in ("esrgan", "compact", "unshuffling"):
        ref = ref_of(files[name])
        (spec,) = engine.cache.parts(ref)
        model = engine.cache.lease(ref)
        assert model is not None
        assert model.bytes == spec.bytes == engine.cache.device_bytes(ref)
        engine.cache.release(ref)
    half = kind_of(files["esrgan"])
    assert half.dtype(torch.float16) == torch.float16
    assert half.dtype(torch.float64) == torch.float32


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_an_architecture_that_is_not_to_be_cut(engine: Engine, tmp_path: Path) -> None:
    path = upscalers.save(upscalers.swin(), tmp_path / "swin.safetensors")
    (spec,) = engine.cache.parts(ref_of(path))
    kind = kind_of(path)
    assert (kind.tiles, kind.dtype(torch.float16)) == (False, torch.float32)
    for size in ((100, 90), (9, 30)):
        picture = a_picture(*size)
        made, said = engine.upscaling.run(picture[None], Order(upscale_by(path, tile=64)))
        assert said["upscaler"]["pieces"] == [1, 1]
        assert np.array_equal(made[0], plainly(path, picture))
    assert engine.cache.sizes()[ref_of(path).key] == spec.bytes


def test_upscalers_make_room_for_each_other(tmp_path: Path) -> None:
    paths = [upscalers.save(upscalers.compact(n), tmp_path / f"{n}.safetensors") for n in range(4)]
    one = kind_of(paths[0]).floats * 4
    engine = Engine(Device("cpu"), Budgets(device=2 * one, host=2 * one, shared=True, capacity=2 * one))
    try:
        picture = a_picture(40, 40)
        for n in (0, 1, 2, 3, 0, 3, 1):
            assert np.array_equal(larger(engine, picture, paths[n])[0], plainly(paths[n], picture))
            assert engine.cache.memory().device <= 2 * one
        held = engine.cache.held()
        assert sorted(ref.ref.folder for ref in held.values()) == [str(paths[1]), str(paths[3])]
        big = upscalers.save(upscalers.esrgan(), tmp_path / "big.safetensors")
        with pytest.raises(ApiError) as refused:
            engine.upscaling.check(extra(big, picture))
        assert refused.value.code == "OUT_OF_MEMORY"
    finally:
        engine.close()


def tiny_request(folder: Path, seed: int, upscale: Any = None, **more: Any) -> GenerationRequest:
    inputs = {"prompt": "a cat", "num_inference_steps": 4, "width": 64, "height": 64}
    model = ModelRef("tiny", "1", "fp32", str(folder))
    return a_request(
        str(seed), model, "StableDiffusionPipeline", "DDIMScheduler", inputs, seed=seed, upscale=upscale, **more
    )


def test_after_a_generation_and_beside_others(files: dict[str, Path], tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    engine = Engine(Device("cpu"))
    try:
        plain = [engine.generate(tiny_request(tmp_path / "tiny", seed)) for seed in range(3)]
        made = engine.generate(tiny_request(tmp_path / "tiny", 1, upscale_by(files["compact"], tile=64)))
        assert np.array_equal(made.images[0], plainly(files["compact"], plain[1].images[0]))
        assert "upscale" in made.timings
        assert made.meta["numerics"] == plain[1].meta["numerics"]
        pictures = [a_picture(150, 130, seed=n) for n in range(3)]
        before = engine.executor.calls, engine.executor.runs
        requests = [
            tiny_request(tmp_path / "tiny", 0),
            tiny_request(tmp_path / "tiny", 1, upscale_by(files["compact"], tile=64)),
            tiny_request(tmp_path / "tiny", 2, upscale_by(files["esrgan"], scale=2)),
            *(extra(files["compact"], picture, tile=80) for picture in pictures),
            extra(files["esrgan"], pictures[0], tile=80),
            tiny_request(tmp_path / "tiny", 0, upscale_by(files["compact"])),
        ]
        with ThreadPoolExecutor(8) as pool:
            found = [each.images[0] for each in pool.map(engine.generate, requests)]
        assert apart(found[0], plain[0].images[0]) <= 1
        assert apart(found[1], plainly(files["compact"], plain[1].images[0])) <= 2
        small = Image.fromarray(plainly(files["esrgan"], plain[2].images[0])).resize(
            (128, 128), Image.Resampling.LANCZOS
        )
        assert apart(found[2], np.asarray(small)) <= 2
        for made_of, picture in zip(found[3:6], pictures, strict=True):
            assert apart(made_of, plainly(files["compact"], picture)) <= 1
        assert apart(found[6], plainly(files["esrgan"], pictures[0])) <= 1
        assert apart(found[7], plainly(files["compact"], plain[0].images[0])) <= 2
        calls, runs = engine.executor.calls - before[0], engine.executor.runs - before[1]
        assert runs < calls, "pieces of several jobs were merged with none"
    finally:
        engine.close()


def test_on_a_device_with_memory_of_its_own_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU as far as a CPU goes: weights are copied from the host's memory, and cast where they can be."""
    paths = [upscalers.save(upscalers.compact(n), tmp_path / f"{n}.safetensors") for n in range(2)]
    device = Device("cpu")
    device.shares_host = False
    monkeypatch.setattr(device, "dtype", {"fp32": torch.float32, "fp16": torch.float16}.__getitem__)
    one = kind_of(paths[0]).floats * 2
    engine = Engine(device, Budgets(device=one, host=4 * one, shared=False))
    try:
        picture = a_picture(90, 100)
        for path in (*paths, paths[0]):
            made, said = engine.upscaling.run(picture[None], Order(upscale_by(path, tile=80, precision="fp16")))
            assert said["upscaler"]["dtype"] == "float16"
            assert 0 < apart(made[0], plainly(path, picture)) <= 3
        held = {each.ref.folder: (each.device, each.host) for each in engine.cache.held().values()}
        assert held == {str(paths[0]): (one, one), str(paths[1]): (0, one)}
    finally:
        engine.close()


def test_it_is_cancelled_between_two_pieces(engine: Engine, files: dict[str, Path]) -> None:
    stop, pieces = threading.Event(), list[int]()

    def on_piece(piece: int, total: int) -> None:
        pieces.append(piece)
        if piece == 2:
            stop.set()

    request = extra(files["compact"], a_picture(300, 300), tile=80)
    with pytest.raises(Cancelled):
        engine.generate(request, on_step=on_piece, cancelled=stop.is_set)
    assert pieces == [1, 2]
    with pytest.raises(Cancelled):
        engine.generate(request, cancelled=lambda: True)
    assert all(not each.leases for each in engine.cache.held().values())


def test_memory_that_does_not_suffice(engine: Engine, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    picture, tries = a_picture(100, 100), list[int]()

    def full(self: Any, upscaler: Any, piece: torch.Tensor, ticket: Any) -> torch.Tensor:
        tries.append(len(tries))
        if len(tries) < 2 or not once:
            raise torch.OutOfMemoryError("there is none")
        return real(self, upscaler, piece, ticket)

    once, real = True, type(engine.upscaling)._call
    monkeypatch.setattr(type(engine.upscaling), "_call", full)
    assert np.array_equal(larger(engine, picture, files["compact"])[0], plainly(files["compact"], picture))
    assert len(tries) == 2  # in company, and alone
    once = False
    with pytest.raises(ApiError) as refused:
        larger(engine, picture, files["compact"])
    assert (refused.value.code, refused.value.field) == ("OUT_OF_MEMORY", "callInputs.upscale.tile")
    assert all(not each.leases for each in engine.cache.held().values())


def test_what_is_no_upscaler_is_refused_before_anything_runs(
    engine: Engine, files: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files["compact"].read_bytes()[:-100])
    text = tmp_path / "text.safetensors"
    text.write_bytes(b"not weights at all")
    other = tmp_path / "other.safetensors"
    save_file({"some.weight": torch.zeros(3, 3)}, other)
    part = tmp_path / "part.safetensors"
    weights = upscalers.compact().state_dict()
    save_file({name: tensor for name, tensor in weights.items() if name != "body.2.weight"}, part)
    for path, code in (
        (broken, "MODEL_BROKEN"),
        (text, "MODEL_BROKEN"),
        (other, "INVALID_UPSCALER"),
        (part, "INVALID_UPSCALER"),
    ):
        request = tiny_request(tmp_path / "there-is-no-such-model", 1, upscale_by(path))
        with pytest.raises(ApiError) as refused:
            engine.generate(request)
        error = refused.value
        assert (error.code, error.field, error.requested) == (code, "callInputs.upscale.model", f"tiny/{path.name}")
        assert str(tmp_path) not in error.message


def test_a_limit_holds_for_what_is_made_on_the_way(engine: Engine, files: dict[str, Path], tmp_path: Path) -> None:
    picture = a_picture(100, 100)
    assert larger(engine, picture, files["esrgan"], most=400 * 400).shape == (1, 400, 400, 3)
    for how in ({"most": 400 * 400 - 1}, {"most": 400 * 400, "scale": 4.1}, {"most": 300 * 300, "scale": 2.0}):
        with pytest.raises(ApiError) as refused:
            larger(engine, picture, files["esrgan"], **how)
        assert refused.value.code == "LIMIT_EXCEEDED"
        assert "MAX_UPSCALED_PIXELS" in refused.value.message
    # of a generation too, before it runs
    within = tiny_request(tmp_path / "no-such-model", 1, upscale_by(files["esrgan"], most=256 * 256))
    second = msgspec.structs.replace(within, takes=Handover("hires", "images", (72, 64)))
    picture = {"image": Picture("RGB", 80, 80, b"", "")}
    painted = msgspec.structs.replace(within, inputs={"strength": 0.5}, pictures=picture)
    for request in (
        tiny_request(tmp_path / "no-such-model", 1, upscale_by(files["esrgan"], most=255 * 255)),
        msgspec.structs.replace(within, then=(second,)),
        painted,
    ):
        with pytest.raises(ApiError) as refused:
            engine.generate(request)
        assert refused.value.code == "LIMIT_EXCEEDED"


def test_there_is_no_torchvision_for_anybody_else() -> None:
    assert len(import_spandrel().MAIN_REGISTRY) > 40
    if importlib.util.find_spec("torchvision") is None:
        assert not [name for name in sys.modules if name.startswith("torchvision")]


@pytest.mark.slow
def test_spandrel_is_imported_without_torchvision_and_leaves_none_behind() -> None:
    code = (
        "import importlib.util, sys\n"
        "from api.engine.spandrel_import import import_spandrel\n"
        "spandrel = import_spandrel()\n"
        "assert len(spandrel.MAIN_REGISTRY) > 40\n"
        "assert importlib.util.find_spec('torchvision') is None\n"
        "assert not [name for name in sys.modules if name.startswith('torchvision')], 'left behind'\n"
        "assert import_spandrel() is spandrel\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
