"""Every scheduler of diffusers on the demo model: it draws what was asked, runs and is made for other models, or is refused.

The table of ``docs/schedulers.md`` is made here: ``WRITE_DOCS=1 .venv/bin/python -m pytest -m slow
tests/server/test_schedulers.py``.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from api.schema.schedulers import scheduler_classes
from api.service.samplers import samplers
from scripts.demo_model.checker import check
from scripts.demo_model.grammar import Scene, Thing, caption
from tests.running import ROOT, Server, images_of

PAGE = ROOT / "docs" / "schedulers.md"
SUITS, RUNS, REFUSED = "draws what was asked", "runs, does not suit", "422"
SCENES = [
    Scene("one", (Thing("red", "circle"),), "blue"),
    Scene("one", (Thing("yellow", "square"),), "black"),
    Scene("one", (Thing("green", "ring"),), "white"),
    Scene("one", (Thing("purple", "cross"),), "white"),
]
HEAD = """# Schedulers

`SCHEDULER` takes a class of diffusers or one of the names below, `scheduler_args` its arguments. Both are checked against
`GET /schedulers`, which lists every class with its arguments; with `?MODEL_ID=…` also whether it suits that model. What
is not sent is as the model was saved. `$meta` says the class, the arguments, and why it does not suit the model, where it
runs all the same (`scheduler_note`).

Models that predict a flow (SD3, FLUX, …) run with `FlowMatchEulerDiscreteScheduler`, and with the solvers that have
`use_flow_sigmas` (UniPC, DPM++, DEIS), which is set for them.

Made by `tests/server/test_schedulers.py`, which runs it all again and compares; do not edit.

## Every class on `demo/shapes`

The demo model predicts `v_prediction`, and was saved with `DPMSolverMultistepScheduler`. Four prompts, 50 steps, guidance
scale 4: how many pictures show everything that was asked for, by `scripts/demo_model/checker.py`.

| scheduler | verdict | right | why |
| --- | --- | --- | --- |
"""
NAMES = """
## Names

As AUTOMATIC1111 has them, in any case. A name without a schedule turns off the schedule that the model was saved with.

| name | is | with |
| --- | --- | --- |
"""


def scheduler_row(server: Server, name: str, scenes: list[Scene], steps: int = 50) -> tuple[str, str, str]:
    """The verdict, how many pictures are right, and why."""

    def ask(seed: int) -> tuple[int, dict]:
        inputs = {"prompt": caption(scenes[seed]), "seed": seed, "num_inference_steps": steps, "guidance_scale": 4}
        response = server.post(inputs, {"SCHEDULER": name})
        return response.status_code, response.json()

    with ThreadPoolExecutor(len(scenes)) as pool:
        answers = list(pool.map(ask, range(len(scenes))))
    status, answer = answers[0]
    assert all(other == status for other, _ in answers), answers
    if status != 200:
        error = answer["$error"]
        assert (status, error["code"]) == (422, "INVALID_SCHEDULER"), answer
        return REFUSED, "", error["message"].removeprefix(f"{name} ")
    right = sum(check(images_of(a)[0], scene).right for (_, a), scene in zip(answers, scenes, strict=True))
    note = answer["$meta"].get("scheduler_note", "").removeprefix(f"{name} ")
    return (RUNS if note else SUITS), f"{right} of {len(scenes)}", note


def table() -> dict[str, tuple[str, str, str]]:
    """What the page says."""
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if "Scheduler` | " in line]
    return {
        row[0].strip("| `"): (row[1], row[2].strip(), row[3].removesuffix(" |").strip(" |"))
        for row in rows
        if len(row) == 4 and row[1] in (SUITS, RUNS, REFUSED)
    }


def names_table() -> str:
    """The part of the page that needs no pictures."""
    rows = []
    for found in samplers().values():
        args = ", ".join(f"{key} = {value}" for key, value in found.args.items() if value is not False)
        rows.append(f"| {found.name} | `{found.scheduler}` | {args} |")
    return NAMES + "\n".join(rows) + "\n"


@pytest.mark.slow
def test_the_table_of_all_schedulers(server: Server) -> None:
    before = server.worker_pids()
    found = {name: scheduler_row(server, name, SCENES) for name in scheduler_classes()}
    if os.environ.get("WRITE_DOCS"):
        lines = [f"| `{name}` | {verdict} | {right} | {why} |" for name, (verdict, right, why) in found.items()]
        PAGE.write_text(HEAD + "\n".join(lines) + "\n" + names_table(), encoding="utf-8")
    said = table()
    assert {name: (row[0], row[2]) for name, row in found.items()} == {n: (r[0], r[2]) for n, r in said.items()}
    for name, (verdict, right, _) in found.items():
        if verdict == SUITS:
            assert int(right[0]) >= 3, f"{name} draws {right}"
    assert server.worker_pids() == before, "a worker died"


def test_what_is_said_of_schedulers_is_so(server: Server) -> None:
    """The same without the pictures that are right: every class that is refused or does not suit, in few steps."""
    said = table()
    assert set(said) == set(scheduler_classes())
    for name, (verdict, _, why) in said.items():
        if verdict != SUITS:
            assert scheduler_row(server, name, SCENES[:1], 4)[::2] == (verdict, why), name
    page = PAGE.read_text(encoding="utf-8")
    assert page.endswith(names_table()), "WRITE_DOCS=1 makes the page again"


def test_schedulers_are_listed_and_say_whether_they_suit_a_model(server: Server) -> None:
    plain = {entry["name"]: entry for entry in server.client.get("/schedulers").json()["schedulers"]}
    assert "suits" not in plain["DDIMScheduler"]
    answer = server.client.get("/schedulers", params={"MODEL_ID": "demo/shapes"}).json()
    words = {(True, True): SUITS, (True, False): RUNS, (False, False): REFUSED}
    found = {entry["name"]: words[entry["compatible"], entry["suits"]] for entry in answer["schedulers"]}
    assert found == {name: row[0] for name, row in table().items()}
    unknown = server.client.get("/schedulers", params={"MODEL_ID": "not/here"})
    assert unknown.status_code == 404
    assert server.client.get("/schedulers", params={"MODLE_ID": "x"}).status_code == 400


def test_names_and_arguments_reach_the_picture_and_the_meta(server: Server) -> None:
    inputs = {"prompt": caption(SCENES[0]), "seed": 3, "num_inference_steps": 8, "guidance_scale": 4}

    def draw(**options: object) -> tuple[np.ndarray, dict]:
        response = server.post(inputs, options)
        assert response.status_code == 200, response.text
        return images_of(response.json())[0], response.json()["$meta"]

    karras, meta = draw(SCHEDULER="DPM++ 2M Karras")
    assert meta["SCHEDULER"] == "DPMSolverMultistepScheduler"
    assert meta["scheduler_alias"] == "DPM++ 2M Karras"
    assert meta["scheduler_args"]["use_karras_sigmas"] is True
    plain, _ = draw(SCHEDULER="DPM++ 2M")
    trailing, _ = draw(SCHEDULER="DPM++ 2M", scheduler_args={"timestep_spacing": "trailing"})
    again, _ = draw(SCHEDULER=meta["SCHEDULER"], scheduler_args=meta["scheduler_args"])
    assert not np.array_equal(karras, plain)
    assert not np.array_equal(plain, trailing)
    assert np.array_equal(karras, again)
    own, meta = draw()
    assert "scheduler_args" not in meta
    assert np.array_equal(own, karras)  # as it was saved


def test_a_scheduler_that_fails_on_its_arguments_is_a_422_and_the_worker_lives(server: Server) -> None:
    before = server.worker_pids()
    asked = [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "zero"}, "final_sigmas_type"),
        ("EulerDiscreteScheduler", {"num_train_timesteps": 3}, ""),
        ("DDPMScheduler", {"variance_type": "learned_range"}, ""),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "beta_start": 5.0, "beta_end": -3.0}, ""),
    ]  # fmt: skip
    for name, args, says in asked:
        inputs = {"prompt": "a red circle", "num_inference_steps": 4}
        response = server.post(inputs, {"SCHEDULER": name, "scheduler_args": args})
        assert response.status_code in (200, 422), response.text
        if response.status_code == 422 or says:
            assert response.json()["$error"]["code"] == "INVALID_SCHEDULER"
            assert says in response.json()["$error"]["message"]
    assert server.worker_pids() == before
