"""Where a command runs: device, autocast dtype, and the memory there."""
import contextlib
import datetime
import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version

import torch

from .distributed import rank_and_size
from .errors import InputError
from .processes import out_of_memory


def pick_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:N` -> torch.device; of several processes on a machine, each takes a GPU of its own.

    Raises InputError listing the devices there are.
    """
    count, processes = torch.cuda.device_count(), rank_and_size()[1]
    there = ["cpu"] + [f"cuda:{i}" for i in range(count)]
    if name == "cuda" or (name == "auto" and count):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0) if processes > 1 else 0}"
    elif processes > 1 and name.startswith("cuda"):
        raise InputError(f"--device {name}: {processes} processes cannot share a GPU; --device cuda gives each its own")
    if name == "auto":
        name = "cpu"
    if name not in there:
        raise InputError(f"--device {name} is not there; this machine has {', '.join(there)}")
    return torch.device(name)


def pick_amp(name, device):
    """`auto`, `fp16`, `bf16`, `off` -> torch.float16, torch.bfloat16 or None. Raises InputError where the device lacks it."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "off"
    if name == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16: no fp16 training on the CPU; take --amp off or bf16")
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--amp bf16: {torch.cuda.get_device_name(device)} has no bf16; take --amp fp16")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[name]


def peak_memory_mib(device):
    """On CUDA the peak of allocated tensors, on the CPU the peak resident size of the whole process; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@contextlib.contextmanager
def explain_out_of_memory(config, device):
    """Memory that runs out inside is told of in one line: what it was needed for, how much there is, what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        raise RuntimeError(
            f"out of memory on {device} at batch size {config.batch_size} and {config.image_size}x{config.image_size} pixels: "
            f"{peak_memory_mib(device):,.0f} MiB were taken, of {there / 2**20:,.0f} MiB in all; a smaller --batch-size, --image-size or model"
            + (", or --data-on-device no," if device.type == "cuda" else "") + " may fit") from e

PACKAGES = ("torch", "triton", "numpy", "pillow")


def environment(device):
    """Machine and versions, as plain values."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"date": datetime.date.today().isoformat(), "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
            "cuda": torch.version.cuda if device.type == "cuda" else None, **versions}
