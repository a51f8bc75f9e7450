"""The fused depthwise block against plain PyTorch: alone, a conv's backward, and whole training steps."""
import importlib.util
import sys
from functools import partial

import torch

from kernels import depthwise_cpu
from ..runtime.device import pick_amp
from ..runtime.processes import attempt
from .candidates import block_ways, build, build_timm
from .measure import Load, compare_training, saved_bytes, say
from .timing import captured, copy_bandwidth, race, settle_allocator

# N, C, side, K: ConvMixer at patch 24 and 16, ImageNet ConvMixers, and a small kernel, where PyTorch is good
SHAPES = {
    "cuda": [(250, 512, 8, 9), (250, 512, 12, 9), (64, 1024, 16, 9), (64, 768, 32, 7), (64, 1536, 32, 9), (250, 512, 8, 3), (8, 64, 12, 9)],
    "cpu": [(32, 512, 8, 9), (32, 512, 12, 9), (8, 1024, 16, 9), (2, 768, 32, 7), (32, 512, 8, 3), (8, 64, 12, 9)],
}


def measure_kernels(config, rows, device):
    """{list: its rows}: the block alone, a conv's backward alone on the CPU, and whole training steps."""
    amp, on_gpu = pick_amp(config.amp, device), device.type == "cuda"
    lists = {"blocks": [], "convs": [], "steps": []}
    for shape in SHAPES[device.type]:
        say(f"block {shape}")
        measured, failed = attempt(block_rows, shape, amp, config.repeats, device, debug=config.debug)
        lists["blocks"] += measured or [{"shape": shape, "batch_size": shape[0], **failed}]
        if not on_gpu:
            measured, failed = attempt(conv_row, shape, config.repeats, device, debug=config.debug)
            lists["convs"].append(measured or {"shape": shape, "batch_size": shape[0], **failed})
    load = Load(250 if on_gpu else 32, 192, device, amp)
    for row in rows:
        if row.arch == "convmixer":
            say(row.title)
            of = row.arch, row.options, load.image_size, device
            makes = {"eager": partial(build, *of, "torch", False), "compile": partial(build, *of, "torch", True),
                     "fused": partial(build, *of, "auto", False)}
            lists["steps"] += named(row.title, load, compare_training(makes, load, config.repeats, config.debug))
    name = "convmixer_1024_20_ks9_p14"
    if importlib.util.find_spec("timm"):
        say(name)
        load = Load(64 if on_gpu else 8, 224, device, amp)
        makes = {"eager": partial(build_timm, name, "torch", device), "fused": partial(build_timm, name, "auto", device)}
        lists["steps"] += named(f"timm {name}", load, compare_training(makes, load, max(3, config.repeats // 5), config.debug))
    else:
        print(f"nothing of {name}: it needs timm (pip install timm)", file=sys.stderr)
    return lists


def named(model, load, ways):
    return [{"model": model, "image_size": load.image_size, **way} for way in ways]


def block_rows(shape, amp, repeats, device):
    """Forward in training, and forward + backward, of each way; gb_s counts the passes that none can do without: x read, y
    written, and backward x and dy read, dx written."""
    torch.manual_seed(0)
    settle_allocator()
    (N, C, side, K), dtype, copy = shape, amp or torch.float32, copy_bandwidth(device)
    modes = {"forward": {}, "forward + backward": {}}
    saved = {}
    sets = 4 if device.type == "cuda" else 1  # more than the caches hold: a training step does not find its input there either
    for name, (model, memory_format) in block_ways(C, K, device).items():
        inputs = [(torch.randn(N, C, side, side, device=device, dtype=dtype).to(memory_format=memory_format).requires_grad_(),
                   torch.randn(N, C, side, side, device=device, dtype=dtype).to(memory_format=memory_format)) for _ in range(sets)]

        def forward(pair, model=model):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                return model(pair[0])

        def both(pair, forward=forward, model=model):
            torch.autograd.grad(forward(pair), [pair[0], *model.parameters()], pair[1])
        saved[name] = saved_bytes(lambda: forward(inputs[0])) / N
        modes["forward"][name] = captured(torch.no_grad()(forward), inputs, device)
        modes["forward + backward"][name] = captured(both, inputs, device)
    rows = []
    for mode, ways in modes.items():
        times, ratios = race(ways, repeats, device)
        traffic = (2 if mode == "forward" else 5) * N * C * side * side * dtype.itemsize
        for name, t in times.items():
            rows.append({"shape": shape, "batch_size": N, "mode": mode, "way": name, "ms": t.median / sets, "p20": t.p20 / sets,
                         "p80": t.p80 / sets, "faster_than_eager": 1 / ratios[name], "gb_s": traffic * sets / t.median / 1e6,
                         "copy_gb_s": copy, "saved_bytes_per_sample": saved[name]})
    return rows


def conv_row(shape, repeats, device):
    """A depthwise conv's backward alone, PyTorch's own and ours on the CPU."""
    settle_allocator()
    N, C, side, K = shape
    x, dz, weight = torch.randn(N, C, side, side), torch.randn(N, C, side, side), torch.randn(C, 1, K, K)
    ways = {"aten": lambda: torch.ops.aten.convolution_backward(dz, x, weight, [C], [1, 1], [K // 2] * 2, [1, 1], False, [0, 0], C,
                                                                [True, True, False]),
            "ours": lambda: depthwise_cpu.conv_backward(dz, x, weight)}
    times, ratios = race(ways, repeats, device)
    return {"shape": shape, **{f"{name}_{part}": value for name, t in times.items() for part, value in t._asdict().items()},
            "faster": 1 / ratios["ours"]}
