"""What Linux has and other systems lack. Each function does less where the system cannot."""
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

try:
    import fcntl
    import resource
except ModuleNotFoundError:  # Windows: `why_not_here` says so
    fcntl = resource = None

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
# mallopt(3): {parameter: (to keep what is freed, glibc's default)}. No block comes from mmap, which
# free() would unmap; the top of the heap (bytes) is never given back.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
MALLOPT = {M_MMAP_MAX: (0, 65536), M_TRIM_THRESHOLD: (-1, 128 * 1024)}


def why_not_here() -> str | None:
    """Why no command can run on this system, or None."""
    if fcntl is None or resource is None:
        return "this needs Linux or macOS; on Windows, run it in WSL (`wsl --install`)"
    return None


def cores() -> int:
    """The cores that this process may use; on macOS, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


def set_death_signal(signum: int) -> int:
    """Let the system send this process `signum` when its parent ends; 0 for none.

    Returns the signal that was set before. prctl(2), Linux alone: elsewhere nothing is sent.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    before = ctypes.c_int(0)
    if prctl:
        prctl(PR_GET_PDEATHSIG, ctypes.byref(before))
        prctl(PR_SET_PDEATHSIG, signum)
    return before.value


def limit_memory(more: int) -> None:
    """Let this process map `more` bytes beyond what it has, then raise MemoryError.

    A lower limit stays. macOS does not tell what a process has, and enforces no such limit.
    """
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as f:
            limit = int(f.read().split()[0]) * resource.getpagesize() + more
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = min(bytes for bytes in (limit, soft, hard) if bytes != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def peak_resident_mib() -> float:
    """MiB of memory that this process had at most."""
    try:
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["VmHWM"].split()[0]) / 2**10
    except (OSError, KeyError, ValueError):
        # may count what the parent had when it started this process
        unit = 1 if sys.platform == "darwin" else 2**10  # bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_mib() -> float:
    """MiB of this machine; nan if the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (ValueError, OSError):
        return float("nan")


def cpu_name() -> str | None:
    """As /proc/cpuinfo has it, if there is one."""
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as f:
            return next((line.split(":", 1)[1].strip() for line in f
                         if line.startswith("model name")), None)
