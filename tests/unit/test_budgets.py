"""What models may take, from settings and what is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.engine.budgets import Memory, budgets, host_memory

GB = 10**9


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 800 kB\n", "proc/self/cgroup": cgroup, **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_control_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert host_memory(machine(tmp_path, "0::/\n", {})) == Memory(1000 * 1024, 800 * 1024)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param(
            "0::/a/b\n",
            {
                "a/memory.max": "500000\n",
                "a/memory.current": "300000\n",
                "a/memory.stat": "anon 1\ninactive_file 100000\n",
                "a/b/memory.max": "max\n",
                "a/b/memory.current": "7\n",
            },
            Memory(500000, 300000),
            id="the tightest on the way up",
        ),
        pytest.param(
            "5:cpu:/x\n4:memory:/box\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/box/memory.limit_in_bytes": "600000\n",
                "memory/box/memory.usage_in_bytes": "200000\n",
                "memory/box/memory.stat": "total_inactive_file 50000\n",
            },
            Memory(600000, 450000),
            id="version one, whose no limit is none",
        ),
        pytest.param(
            "0::/kubepods/pod1/c\n",
            {"memory.max": "400000\n", "memory.current": "100000\n"},
            Memory(400000, 300000),
            id="a path of the host leads to the one at the top",
        ),
    ],
)
def test_control_groups_count(tmp_path: Path, cgroup: str, files: dict[str, str], expected: Memory) -> None:
    found = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert host_memory(machine(tmp_path, cgroup, found)) == expected


def test_this_machine_has_memory() -> None:
    memory = host_memory()
    assert 0 < memory.free <= memory.total


def test_what_others_use_on_the_device_is_left_to_them() -> None:
    host = Memory(100 * GB, 90 * GB)
    alone = budgets(None, None, Memory(24 * GB, 23 * GB), host)
    beside = budgets(None, None, Memory(24 * GB, 10 * GB), host)
    assert beside.device < 10 * GB < alone.device < 23 * GB
    assert (alone.host, alone.shared) == (50 * GB, False)
    assert budgets(0.5, None, Memory(24 * GB, 20 * GB), host).device == 12 * GB
    assert budgets(20 * GB, None, Memory(24 * GB, 10 * GB), host).device == 10 * GB


@pytest.mark.parametrize(
    ("vram", "ram", "expected"), [(None, None, (40, 40)), (30, None, (30, 40)), (50, 10, (10, 10))]
)
def test_on_a_cpu_both_tiers_are_the_same_memory(vram: int | None, ram: int | None, expected: tuple) -> None:
    found = budgets(vram and vram * GB, ram and ram * GB, None, Memory(80 * GB, 70 * GB))
    assert (found.device, found.host) == (expected[0] * GB, expected[1] * GB)
    assert found.shared


def test_workers_share_the_hosts_memory() -> None:
    assert budgets(None, None, None, Memory(80 * GB, 80 * GB), workers=4).host == 10 * GB


def test_what_all_workers_may_take_is_settled_once() -> None:
    """One that starts again finds less memory free: what it lacks is what the others, or it before, have taken."""
    found = budgets(None, 3 * 2**30, None, Memory(8 * 2**30, 2**30), workers=4, settled=True)
    assert (found.host, found.device) == (3 * 2**30, 3 * 2**30)
