"""Several ranks of one run on this machine, which exchange numbers over gloo."""
import contextlib
import random
import socket

import pytest
from torch import distributed as dist


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
