"""One run in several ranks (processes), as torchrun starts them.

Every rank has all images, trains on its slice of each batch, and makes the same decisions at the
same step. Rank 0 prints and writes files. Beside gradients, the ranks exchange a few numbers, over
gloo, on the CPU.
"""
import concurrent.futures
import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from . import signals
from .errors import InputError, first_line


def rank_and_size() -> tuple[int, int]:
    """RANK and WORLD_SIZE, which torchrun sets; (0, 1) without torchrun."""
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return tuple(map(int, words)) if all(word.isdecimal() for word in words) else (0, 1)


@dataclass(frozen=True)
class World:
    """The ranks of a run, and which of them this process is. A single rank sends nothing."""

    rank: int = 0
    size: int = 1

    def batch_slice(self, samples: np.ndarray) -> np.ndarray:
        """This rank's slice of the (B,) samples of a batch. Slices differ by one sample at most."""
        return np.array_split(samples, self.size)[self.rank]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def broadcast(self, value):
        """Rank 0's value, in all ranks: plain values and CPU tensors."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Copy rank 0's BatchNorm statistics to all ranks. Without --sync-bn each has its own."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextlib.contextmanager
def process_group(device: torch.device, name: str) -> Iterator[World]:
    """Inside, the ranks that torchrun started are one World. Without torchrun, a World of one.

    name: of this group; one torchrun may start several runs, one after another (--arch all).
    Raises InputError if the other ranks cannot be found.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the default of NCCL and Triton
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = _interruptible(_meet, name)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        # Rank 0 may find an error at once, and end while the others are still connecting to it.
        if rank == 0:
            _interruptible(store.wait, [f"connected {other}" for other in range(1, size)])
        else:
            store.set(f"connected {rank}", "")
    except (ValueError, RuntimeError) as e:
        raise InputError(f"RANK and WORLD_SIZE say that this is process {rank} of {size}, "
                         f"but the others cannot be found ({first_line(e)}): "
                         "start with torchrun, or unset them") from e
    yield World(rank, size)
    dist.destroy_process_group()  # not after a failure: it could wait for ranks that have died


def _interruptible(f, *args):
    """f(*args) in a thread. In the main thread, C++ code that waits would delay every signal."""
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(f(*args))
        except Exception as e:
            future.set_exception(e)
    threading.Thread(target=work, daemon=True).start()
    while not future.done():
        signals.check()
        time.sleep(0.01)
    return future.result()


def _meet(name):
    """Wait for all ranks. Return (store, rank, size); the store holds nothing of earlier ranks.

    torchrun keeps its store when it restarts ranks, with the addresses of the dead ones in it
    (pytorch issue 135712), and machines may count restarts differently. So the ranks agree on a
    new prefix for their keys:

    1. Each rank > 0 posts a random token, and waits for the reply to it.
    2. Rank 0 replies to every token with its own token, which becomes the prefix.
    3. Each rank > 0 confirms the prefix. Rank 0 waits for all confirmations.

    Tokens left by dead ranks get a reply that nobody reads.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(name, store)
    token = uuid.uuid4().hex
    if rank == 0:
        prefix = token
        _gather(store, prefix, size)
    else:
        store.set(f"token {rank}", token)
        prefix = store.get(token).decode()  # waits
        store.set(f"{prefix} {rank}", "confirmed")
    return dist.PrefixStore(prefix, store), rank, size


def _gather(store, prefix, size):
    """Rank 0's side of `_meet`."""
    missing = set(range(1, size))
    deadline = time.monotonic() + store.timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(missing)} of them did not come within {store.timeout}")
        missing = {rank for rank in missing if not store.check([f"{prefix} {rank}"])}
        for rank in missing:
            if store.check([f"token {rank}"]):
                token = store.get(f"token {rank}").decode()
                store.set(token, prefix)
        time.sleep(0.01)


def lost_another(e: BaseException) -> bool:
    """Whether an exception says that another rank has died."""
    return isinstance(e, dist.DistError) or "gloo/transport" in str(e)
