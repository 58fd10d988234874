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


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/a/memory.max": "500000\n",
        "sys/fs/cgroup/a/memory.current": "300000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 100000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "7\n",
    }
    assert host_memory(machine(tmp_path, "0::/a/b\n", files)) == Memory(500000, 300000)


def test_version_one_too_and_its_no_limit_is_none(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "600000\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "200000\n",
        "sys/fs/cgroup/memory/box/memory.stat": "total_inactive_file 50000\n",
    }
    assert host_memory(machine(tmp_path, "5:cpu:/x\n4:memory:/box\n0::/\n", files)) == Memory(600000, 450000)


def test_a_path_of_the_host_leads_to_the_group_at_the_top(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "400000\n", "sys/fs/cgroup/memory.current": "100000\n"}
    assert host_memory(machine(tmp_path, "0::/kubepods/pod1/c\n", files)) == Memory(400000, 300000)


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
