"""Where a command runs: device, autocast dtype, memory, cores, versions."""
import contextlib
import ctypes
import datetime
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from .errors import InputError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}
PACKAGES = ("torch", "triton", "numpy", "pillow")
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # mallopt(3)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> torch.device. Each rank has its own GPU.

    Raises InputError with the devices of this machine.
    """
    gpus = torch.cuda.device_count()
    devices = ["cpu", *(f"cuda:{i}" for i in range(gpus))]
    if name == "cuda" or (name == "auto" and gpus):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = "cpu" if name == "auto" else name
    if name not in devices:
        raise InputError(f"--device {name}: no such device; choose from {', '.join(devices)}")
    return torch.device(name)


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices natively: AVX-512, AMX, or ARM's BF16."""
    capabilities = torch.cpu.get_capabilities()
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # ATEN_CPU_CAPABILITY lowers it
    return any(capabilities.get(name) and (avx512 or name == "bf16")
               for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """`auto`, `fp16`, `bf16` or `off` -> the autocast dtype, None for off."""
    if name == "auto":
        has_bf16 = device.type == "cpu" and has_native_bf16()
        name = "fp16" if device.type == "cuda" else "bf16" if has_bf16 else "off"
    return DTYPES[name]


def dtype_name(amp: torch.dtype | None) -> str:
    """The dtype that matrix products have under autocast to `amp`: "bfloat16"."""
    return str(amp or torch.float32).removeprefix("torch.")


def peak_memory_mib(device: torch.device) -> float:
    """MiB. CUDA: the peak of allocated tensors; else the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM"):  # some sandboxes do not give it
                return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # a Mac counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def keep_freed_memory() -> None:
    """From now on, glibc keeps what this process frees; other allocators stay as they are.

    By default it returns each large tensor to the system. The next step then waits until the same
    pages are mapped and cleared again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda parameter, value: None)
    mallopt(M_MMAP_MAX, 0)         # no block comes from mmap, which free() would unmap
    mallopt(M_TRIM_THRESHOLD, -1)  # the top of the heap is never given back


def cores() -> int:
    """The cores that this process may use: its affinity, and the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    count = len(affinity(0)) if affinity else os.cpu_count()
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as f:
        quota, period = map(int, f.read().split())  # no quota: "max", a ValueError
        count = max(1, min(count, quota // period))
    return count


def environment(device: torch.device) -> dict[str, str | None]:
    """Date, machine and versions, as plain values."""
    # the machine
    gpu, name = device.type == "cuda", platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")),
                    name)
    name = f"{name}, {torch.get_num_threads()} threads"
    # the packages
    versions = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"date": datetime.date.today().isoformat(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if gpu else name,
            "cuda": torch.version.cuda if gpu else None, "python": platform.python_version(),
            **versions}
