"""Facts of the machine, read from /proc: for the hello, and every minute for telemetry.

Nothing here comes from data. A file that is missing (another kernel, a container) gives zero.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from shared.messages import as_text

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Jiffies since the machine started, over all cores."""

    busy: int
    total: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of main memory."""

    total: int
    used: int


def read_cpu_times(proc: Path = _PROC) -> CpuTimes:
    """Read how long the cores have worked and idled so far."""
    fields = _read(proc / "stat").partition("\n")[0].split()[1:9]
    jiffies = [int(value) for value in fields]
    if len(jiffies) < 5:
        return CpuTimes(0, 0)
    idle = jiffies[3] + jiffies[4]  # idle and waiting for disks
    return CpuTimes(sum(jiffies) - idle, sum(jiffies))


def cpu_percent(before: CpuTimes, after: CpuTimes) -> float:
    """Return how busy all cores together were between two readings, 0 to 100."""
    elapsed = after.total - before.total
    return 0.0 if elapsed <= 0 else round(100 * (after.busy - before.busy) / elapsed, 1)


def read_memory(proc: Path = _PROC) -> Memory:
    """Read how much memory there is, and how much of it programs hold."""
    kilobytes = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in _read(proc / "meminfo").splitlines())
        if rest.split()
    }
    total = kilobytes.get("MemTotal", 0) * 1024
    return Memory(total, total - kilobytes.get("MemAvailable", 0) * 1024)


def read_accelerator(proc: Path = _PROC) -> str:
    """Return the names of the NVIDIA accelerators that the kernel's driver lists, or nothing."""
    models = [
        line.partition(":")[2].strip()
        for file in sorted(proc.glob("driver/nvidia/gpus/*/information"))
        for line in _read(file).splitlines()
        if line.startswith("Model:")
    ]
    return as_text(", ".join(models))


def count_cpus() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds ``folder``."""
    return shutil.disk_usage(folder).free


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
