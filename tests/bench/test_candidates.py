import pytest
import torch

from mixer.bench.candidates import PEERS, build, build_peer
from mixer.experiments import ROWS
from mixer.models.flops import forward_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize("row", [row for row in ROWS if row.arch != "vit_linear"],
                         ids=lambda row: row.name)
def test_peers_are_the_same_networks(row):
    ours = build(row, 192, CPU, "torch", False)
    peer = build_peer(row, 192, CPU, False)
    assert type(peer).__module__.split(".")[0] == PEERS[row.arch]
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())
    assert forward_flops(peer, 192) == forward_flops(ours, 192)
