"""One run in several processes, as torchrun starts them: who we are, what we share out, what we agree on.

Every process has all images, takes its part of each batch, and comes to the same decisions at the same step. The first
(rank 0) speaks and writes. What processes tell each other beside gradients are a few numbers, over gloo, on the CPU.
"""
import concurrent.futures
import contextlib
import os
import threading
import time
import uuid
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from . import signals
from .errors import InputError


def rank_and_size():
    """Of this process, as torchrun says in RANK and WORLD_SIZE; (0, 1) where it runs by itself."""
    words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return tuple(map(int, words)) if all(word.isdecimal() for word in words) else (0, 1)


@dataclass(frozen=True)
class World:
    """All processes of a run, and which of them this is. With one process nothing is sent anywhere."""

    rank: int = 0
    size: int = 1

    def batch_slice(self, samples):
        """This process's part of the (B,) samples of a batch; parts differ by one at most."""
        return np.array_split(samples, self.size)[self.rank]

    def sum(self, tensor):
        """The sum of a tensor over all processes, in each of them."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def max(self, number):
        """The largest of one whole number a process."""
        if self.size == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def broadcast(self, value):
        """What the first process holds, plain values and CPU tensors, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def broadcast_buffers(self, model):
        """Give all processes the first one's BatchNorm statistics: each takes its own where they are not synchronised."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextlib.contextmanager
def process_group(device, name):
    """Inside, the processes that torchrun started are one World; alone, a World of one. `name` keeps runs apart that one
    torchrun starts one after another. Raises InputError where the others are not to be found."""
    rank, size = rank_and_size()
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what NCCL and Triton take where nothing else is said
    try:
        store, rank, size = _heeding_signals(_meet, name)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"RANK and WORLD_SIZE say that this is process {rank} of {size}, but the others are not to be found "
                         f"({str(e).splitlines()[0]}): start with torchrun, or unset them") from e
    yield World(rank, size)
    dist.destroy_process_group()  # not after a failure, where it could wait for those that are gone


def _heeding_signals(f, *args):
    """f(*args), in a thread: in C++ it would wait for processes that may never come, and no signal would be heard."""
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
    """(store, rank, size) of the processes that torchrun started, once all are there; the store is theirs alone.

    torchrun keeps its store when it starts processes again, and with it the addresses of those that are gone (pytorch issue
    135712); nor does it count the attempts alike on all machines. So each process greets with a word of its own until the
    first one answers it with its word, and that waits until all have taken this up: an old greeting is answered in vain.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    store, word = dist.PrefixStore(name, store), uuid.uuid4().hex
    if rank:
        store.set(f"greeting {rank}", word)
        word = store.get(word).decode()  # waits
        store.set(f"{word} {rank}", "taken up")
        return dist.PrefixStore(word, store), rank, size
    missing, until = set(range(1, size)), time.monotonic() + store.timeout.total_seconds()
    while missing:
        if time.monotonic() > until:
            raise RuntimeError(f"nothing of {len(missing)} of them for {store.timeout}")
        missing -= {other for other in missing if store.check([f"{word} {other}"])}
        for other in missing:
            if store.check([f"greeting {other}"]):
                store.set(store.get(f"greeting {other}").decode(), word)
        time.sleep(0.01)
    return dist.PrefixStore(word, store), rank, size


def lost_another(e):
    """Whether an exception says that another process of the run is gone."""
    return isinstance(e, dist.DistError) or "gloo/transport" in str(e)
