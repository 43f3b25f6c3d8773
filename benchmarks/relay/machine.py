"""What the kernel says: CPU time of a process tree, and the facts of this machine."""

import os
import platform
from pathlib import Path

_PROC = Path("/proc")


def cpu_ns(pid: int) -> int:
    """Nanoseconds on a CPU of all threads of a process and of its descendants.

    Source: the first field of /proc/PID/task/TID/schedstat (Documentation/scheduler/sched-stats.rst).
    """
    total = 0
    for task in (_PROC / str(pid) / "task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
            children = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # The thread has ended since it was listed.
        total += sum(cpu_ns(int(child)) for child in children)
    return total


def resident_bytes(pid: int) -> int:
    """Resident memory of the process itself."""
    pages = int((_PROC / str(pid) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def facts() -> dict[str, str | int | float]:
    """What a reader needs to compare runs."""
    models = [line.partition(":")[2].strip() for line in _lines("cpuinfo") if line.startswith("model name")]
    memory_kib = [int(line.split()[1]) for line in _lines("meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib[0] / 2**20, 1) if memory_kib else 0.0,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _lines(name: str) -> list[str]:
    return (_PROC / name).read_text(encoding="utf-8").splitlines()
