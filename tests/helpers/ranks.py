"""Several ranks of one run on this machine, which exchange numbers over gloo."""
import contextlib
import datetime
import os
import random
import socket

import pytest
import torch
from torch import distributed as dist

from tests.helpers.commands import HANGS, forked


def rank_environments(count: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each of `count` ranks."""
    while True:
        port = random.randrange(20_000, 32_000)  # below those that the system gives away
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            break
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
             "GLOO_SOCKET_IFNAME": "lo"}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def results_of_ranks(function, count: int, folder) -> list:
    """[function(rank, count) for each rank], each in a process of one process group.

    The results come back through files in `folder`.
    """
    processes = [forked(_be_rank, env, function, folder) for env in rank_environments(count)]
    for process in processes:
        process.join(HANGS)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]


@contextlib.contextmanager
def group_of_one(folder):
    """Inside, this process is the only rank of a process group, which meets in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _be_rank(env, function, folder):
    os.environ.update(env)
    rank, count = int(env["RANK"]), int(env["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANGS))
    torch.save(function(rank, count), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
