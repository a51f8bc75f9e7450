"""Cores and memory of this machine and this process."""
import contextlib
import ctypes
import os
import resource
from collections.abc import Iterator

# mallopt(3): {parameter: (to keep what is freed, glibc's default)}. No block comes from mmap, which
# free() would unmap; the top of the heap (bytes) is never given back.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
MALLOPT = {M_MMAP_MAX: (0, 65536), M_TRIM_THRESHOLD: (-1, 128 * 1024)}


def cores() -> int:
    """The cores that this process may use: its affinity, and the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    count = len(affinity(0)) if affinity else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max" for no quota
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = map(int, f.read().split())
        count = max(1, min(count, quota // period))
    return count


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, glibc keeps what this process frees; without glibc, nothing changes.

    By default it returns each large tensor to the system. The next step then waits until the same
    pages are mapped and cleared again. Afterwards glibc's defaults hold.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    for parameter, (keep, _) in MALLOPT.items():
        libc.mallopt(parameter, keep)
    try:
        yield
    finally:
        for parameter, (_, default) in MALLOPT.items():
            libc.mallopt(parameter, default)


def peak_resident_mib() -> float:
    """MiB of memory that this process had at most."""
    with contextlib.suppress(OSError):  # without /proc
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["VmHWM"].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # a Mac counts bytes
