from functools import partial

import pytest
import torch
from torch import nn

from kernels import DepthwiseGELUBN
from mixer.bench.candidates import PEERS, build, peer_maker
from mixer.experiments import ROWS, Row
from mixer.models import create_model
from mixer.models.flops import forward_flops
from tests.helpers.networks import tiny_convmixer

OTHERS = [Row("ViT", "vit_cnn", options={"patch": 16, "dim": 64, "depth": 2, "heads": 2,
                                         "qkv_bias": True, "norm_eps": 1e-6}),
          Row("ConvMixer", "convmixer", options={"patch": 12, "dim": 32, "depth": 2,
                                                 "kernel_size": 5, "act": "relu"})]


@pytest.mark.parametrize("row", [row for row in ROWS + OTHERS if row.arch in PEERS],
                         ids=lambda row: row.name)
def test_peers_are_the_same_networks(row):
    ours, peer = create_model(row.arch, **row.options), peer_maker(row, 192)()
    assert type(peer).__module__.split(".")[0] == PEERS[row.arch][0].split(".")[0]
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in ours.parameters())
    assert forward_flops(peer, 192) == forward_flops(ours, 192)
    if row.arch == "convmixer":
        assert type(peer.stem[1]) is type(ours.stem[1]), "activation"
    assert {m.eps for m in peer.modules() if isinstance(m, nn.LayerNorm)} == {
        m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)}


def test_only_what_can_be_fused_is_fused():
    device = torch.device("cpu")
    for kernels, count in (("auto", 1), ("torch", 0)):
        model = build(tiny_convmixer, device, kernels)
        assert sum(isinstance(m, DepthwiseGELUBN) for m in model.modules()) == count
    build(partial(create_model, "vit_cnn", patch=96, dim=8, depth=1), device, "auto")
