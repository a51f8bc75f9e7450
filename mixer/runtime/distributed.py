"""One run in several ranks (processes), as torchrun starts them.

Every rank has all images, trains on its slice of each batch, and makes the same decisions at the
same step. Rank 0 prints and writes files. CUDA tensors are sent over NCCL, the rest over gloo.
"""
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """RANK and WORLD_SIZE, which torchrun sets; (0, 1) without torchrun."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


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

    name: unique to this run; one torchrun may start several, one after another (--arch all).
    """
    rank, size = rank_and_size()
    if size == 1:
        yield World()
        return
    print(f"waiting for all {size} ranks (WORLD_SIZE) to join", flush=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the default of NCCL and Triton
    # one store per torchrun; the name keeps its runs apart
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            store=dist.PrefixStore(name, store), rank=rank, world_size=size)
    yield World(rank, size)
    dist.destroy_process_group()  # not after a failure: it could wait for ranks that have died
