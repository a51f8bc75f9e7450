"""Where a command runs: device, autocast dtype, memory, versions."""
import contextlib
import datetime
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from .distributed import rank_and_size
from .errors import InputError
from .processes import out_of_memory
from .system import peak_resident_mib

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}
PACKAGES = ("torch", "triton", "numpy", "pillow")


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> torch.device. Each rank has its own GPU.

    Raises InputError with the devices of this machine.
    """
    gpus, processes = torch.cuda.device_count(), rank_and_size()[1]
    devices = ["cpu"] + [f"cuda:{i}" for i in range(gpus)]
    if name == "cuda" or (name == "auto" and gpus):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0) if processes > 1 else 0}"
    name = "cpu" if name == "auto" else name
    if name not in devices:
        raise InputError(f"--device {name}: no such device; choose from {', '.join(devices)}")
    return torch.device(name)


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself: AVX-512, AMX, or ARM's BF16."""
    capabilities = torch.cpu.get_capabilities()
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # ATEN_CPU_CAPABILITY can say less
    return any(capabilities.get(name) and (avx512 or name == "bf16")
               for name in ("avx512_bf16", "amx_bf16", "bf16"))


def describe_amp(choice: str, device: torch.device) -> str:
    """The dtype of --amp in words, and why, if it is "auto"."""
    dtype = pick_amp(choice, device)
    text = "fp32" if dtype is None else f"autocast to {str(dtype).removeprefix('torch.')}"
    if choice == "auto" and device.type == "cpu":
        has = "has" if dtype else "has no"
        text += f" (this CPU {has} bf16 products)"
    return text


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """`auto`, `fp16`, `bf16` or `off` -> the autocast dtype, None for off.

    Raises InputError if the device does not support it.
    """
    if name == "auto":
        has_bf16 = device.type == "cpu" and has_native_bf16()
        name = "fp16" if device.type == "cuda" else "bf16" if has_bf16 else "off"
    if name == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16: no fp16 training on the CPU; choose off or bf16")
    return DTYPES[name]


def peak_memory_mib(device: torch.device) -> float:
    """MiB. CUDA: the peak of allocated tensors; else the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_resident_mib()


@contextlib.contextmanager
def explain_out_of_memory(config, device: torch.device) -> Iterator[None]:
    """If memory runs out inside, raise RuntimeError with one line: the peak, and what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
        if device.type == "cuda":
            total = torch.cuda.mem_get_info(device)[1] / 2**20
        raise RuntimeError(
            f"out of memory on {device} at batch size {config.batch_size} and "
            f"{config.image_size}x{config.image_size} pixels: "
            f"{peak_memory_mib(device):,.0f} of {total:,.0f} MiB were in use; "
            "try a smaller --batch-size, --image-size or model") from e


def environment(device: torch.device) -> dict[str, str | None]:
    """Date, machine and versions, as plain values."""
    gpu = device.type == "cuda"
    return {"date": datetime.date.today().isoformat(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if gpu else _cpu(),
            "cuda": torch.version.cuda if gpu else None,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES}}


def _cpu():
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")),
                    name)
    return f"{name}, {torch.get_num_threads()} threads"


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None
