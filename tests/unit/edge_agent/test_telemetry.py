import os
from pathlib import Path

import pytest

from edge_agent.telemetry import (
    CpuTimes,
    Memory,
    count_cpus,
    cpu_percent,
    free_disk_bytes,
    read_accelerator,
    read_cpu_times,
    read_memory,
)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "stat").write_text("cpu  100 5 50 800 40 3 2 0 7 0\ncpu0 1 2 3 4\n")
    (tmp_path / "meminfo").write_text(
        "MemTotal:       16000 kB\nMemFree: 1 kB\nMemAvailable:    6000 kB\nHugePages_Total: 0\n"
    )
    gpu = tmp_path / "driver/nvidia/gpus/0000:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t\t NVIDIA Orin\nIRQ:   1\n")
    return tmp_path


def test_busy_time_leaves_out_idling_and_waiting_for_disks(proc: Path) -> None:
    assert read_cpu_times(proc) == CpuTimes(busy=160, total=1000)


def test_used_memory_is_what_programs_cannot_get(proc: Path) -> None:
    assert read_memory(proc) == Memory(total=16000 * 1024, used=10000 * 1024)


def test_the_accelerator_is_named_by_the_kernels_driver(proc: Path) -> None:
    assert read_accelerator(proc) == "NVIDIA Orin"


def test_a_machine_without_these_files_gives_zeros(tmp_path: Path) -> None:
    assert read_cpu_times(tmp_path) == CpuTimes(0, 0)
    assert read_memory(tmp_path) == Memory(0, 0)
    assert read_accelerator(tmp_path) == ""


@pytest.mark.parametrize(
    ("after", "percent"),
    [(CpuTimes(150, 1100), 50.0), (CpuTimes(100, 1100), 0.0), (CpuTimes(100, 1000), 0.0)],
)
def test_cpu_percent_compares_two_readings(after: CpuTimes, percent: float) -> None:
    assert cpu_percent(CpuTimes(100, 1000), after) == percent


def test_this_machine_has_plausible_facts(tmp_path: Path) -> None:
    assert read_cpu_times().total > read_cpu_times().busy > 0
    assert 0 < read_memory().used < read_memory().total
    assert 1 <= count_cpus() <= (os.cpu_count() or 1)
    assert free_disk_bytes(tmp_path) > 0
