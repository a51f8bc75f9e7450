"""Keep freed memory in the process, so that each training step finds it again."""
import ctypes
import platform

# parameters of mallopt(3), and their values: no allocation by mmap, which free() would unmap; never
# give the heap's top back to the system; grow the heap in large steps
KEEP = {-4: 0, -1: -1, -2: 256 * 2**20}  # M_MMAP_MAX, M_TRIM_THRESHOLD (bytes), M_TOP_PAD (bytes)


def keep_freed_memory() -> None:
    """Tell glibc to keep what this process frees; without glibc, do nothing.

    By default glibc returns each large tensor to the system when it is freed. The next step then
    waits for the kernel to map and clear the same pages again, up to two million times.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in KEEP.items():
            libc.mallopt(parameter, value)
