"""Measure what the models and the kernels take, on whatever machine this runs.

python bench.py --kernels-table
"""
import dataclasses
import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kernels import DepthwiseGELUBN, depthwise_cpu, fuse
from mixer.cli import option, parse, run, wrong_values
from mixer.errors import InputError
from mixer.files import save_atomically, write_json
from mixer.models import create_model
from mixer.models.convmixer import depthwise_unit
from mixer.report import environment
from mixer.timing import captured, copy_bandwidth, race
from mixer.training import make_optimizer, pick_device, train_step


@dataclass(frozen=True)
class Config:
    """Every option of bench.py."""

    kernels_table: bool = option(False, "the fused depthwise block against plain PyTorch, eager and compiled")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto: the GPU where there is one")
    rounds: int = option(15, "times that each way is taken, in turn", least=3)
    out: str | None = option(None, "folder for kernels.json and kernels.md; default: print only")
    debug: bool = option(False, "show a traceback when something fails")


# N, C, side, K: ConvMixer at patch 24 and 16, ImageNet ConvMixers, and a small kernel, where PyTorch is good
SHAPES = {
    "cuda": [(250, 512, 8, 9), (250, 512, 12, 9), (64, 1024, 16, 9), (64, 768, 32, 7), (64, 1536, 32, 9), (250, 512, 8, 3), (8, 64, 12, 9)],
    "cpu": [(32, 512, 8, 9), (32, 512, 12, 9), (8, 1024, 16, 9), (2, 768, 32, 7), (32, 512, 8, 3), (8, 64, 12, 9)],
}
MODELS = {"ConvMixer 24": dict(patch=24), "ConvMixer 16": dict(patch=16), "ConvMixer 16/8": dict(patch=16, depth=8)}


def main(argv):
    given, wrong = parse(Config, argv, __doc__)
    config = Config(**given)
    wrong += wrong_values(config)
    if not config.kernels_table and not wrong:
        wrong.append("nothing to measure: give --kernels-table")
    if wrong:
        raise InputError("\n".join(wrong))
    device = pick_device(config.device)
    result = {"environment": environment(device), "config": dataclasses.asdict(config), **kernels_table(config, device)}
    text = as_markdown(result)
    print(text)
    if config.out:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "kernels.json", result)
        save_atomically(out / "kernels.md", lambda temporary: temporary.write_text(text))


def kernels_table(config, device):
    """{"blocks": rows, "steps": rows, ...}: the block alone, a conv's backward alone on the CPU, and whole training steps."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    result = {"dtype": str(dtype).removeprefix("torch."), "copy_gb_s": copy_bandwidth(device), "blocks": [], "convs": [], "steps": []}
    for shape in SHAPES[device.type]:
        say(f"block {shape}")
        result["blocks"] += block_rows(shape, dtype, config, device)
        if device.type == "cpu" and shape[2:] in ((8, 9), (12, 9)):
            result["convs"].append(conv_row(shape, config, device))
    for name, options in MODELS.items():
        say(name)
        result["steps"].append(step_row(name, partial(convmixer, **options), 250 if device.type == "cuda" else 32, 192, config, device))
    name = "convmixer_1024_20_ks9_p14"
    if importlib.util.find_spec("timm"):
        say(name)
        result["steps"].append(step_row(f"timm {name}", partial(timm_model, name), 64 if device.type == "cuda" else 8, 224,
                                        dataclasses.replace(config, rounds=max(3, config.rounds // 5)), device, ways=("eager", "fused")))
    else:
        say(f"nothing of {name}, which needs timm: pip install timm")
    return result


def block_ways(C, K, device):
    """{name: (module, memory format)}: one block, with residual, in the ways that a user has."""
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fn = depthwise_unit(C, K)

        def forward(self, x):
            return self.fn(x) + x

    def compiled(**options):
        model = Plain().to(device)
        model.compile(options=options or None)
        return model
    return {
        "eager": (Plain().to(device), torch.contiguous_format),
        "eager channels_last": (Plain().to(device, memory_format=torch.channels_last), torch.channels_last),
        "compile": (compiled(), torch.contiguous_format),
        "compile, layout kept": (compiled(layout_optimization=False), torch.contiguous_format),
        "fused": (DepthwiseGELUBN(C, K, residual=True).to(device), torch.contiguous_format),
    }


def block_rows(shape, dtype, config, device):
    """Forward in training, and forward + backward, of each way; gb_s counts the passes that none can do without: x read, y
    written, and backward x and dy read, dx written."""
    torch.manual_seed(0)
    torch.compiler.reset()  # its limit of recompilations counts over all shapes
    N, C, side, K = shape
    modes = {"forward": {}, "forward + backward": {}}
    saved = {}
    sets = 4 if device.type == "cuda" else 1  # more than the caches hold: a training step does not find its input there either
    for name, (model, memory_format) in block_ways(C, K, device).items():
        inputs = [(torch.randn(N, C, side, side, device=device, dtype=dtype).to(memory_format=memory_format).requires_grad_(),
                   torch.randn(N, C, side, side, device=device, dtype=dtype).to(memory_format=memory_format)) for _ in range(sets)]

        def forward(pair, model=model):
            with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
                return model(pair[0])

        def both(pair, forward=forward, model=model):
            torch.autograd.grad(forward(pair), [pair[0], *model.parameters()], pair[1])
        saved[name] = saved_bytes(lambda: forward(inputs[0])) / N
        modes["forward"][name] = captured(torch.no_grad()(forward), inputs, device)
        modes["forward + backward"][name] = captured(both, inputs, device)
    rows = []
    for mode, ways in modes.items():
        times, ratios = race(ways, config.rounds, device)
        traffic = (2 if mode == "forward" else 5) * N * C * side * side * dtype.itemsize
        for name, t in times.items():
            rows.append({"shape": list(shape), "mode": mode, "way": name, "ms": t.median / sets, "p20": t.p20 / sets, "p80": t.p80 / sets,
                         "faster_than_eager": 1 / ratios[name], "gb_s": traffic * sets / t.median / 1e6, "saved_bytes_per_sample": saved[name]})
    return rows


def saved_bytes(f):
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t if isinstance(t, nn.Parameter) else seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        result = f()
    del result
    return sum(t.nbytes for t in seen.values())


def conv_row(shape, config, device):
    """A depthwise conv's backward alone, PyTorch's own and ours on the CPU."""
    N, C, side, K = shape
    x, dz, weight = torch.randn(N, C, side, side), torch.randn(N, C, side, side), torch.randn(C, 1, K, K)
    ways = {"aten": lambda: torch.ops.aten.convolution_backward(dz, x, weight, [C], [1, 1], [K // 2] * 2, [1, 1], False, [0, 0], C,
                                                                [True, True, False]),
            "ours": lambda: depthwise_cpu.conv_backward(dz, x, weight)}
    times, ratios = race(ways, config.rounds, device)
    return {"shape": list(shape), **{name: t._asdict() for name, t in times.items()}, "faster": 1 / ratios["ours"]}


def convmixer(**options):
    return create_model("convmixer", **options)


def timm_model(name):
    import timm
    return timm.create_model(name)


def step_row(name, make, batch, image_size, config, device, ways=("eager", "compile", "fused")):
    """A whole training step, as train.py does it (forward, backward, fused Adam): plain, compiled, fused."""
    torch.compiler.reset()
    steps = {way: make_step(way, make, batch, image_size, device) for way in ways}
    for step in steps.values():
        step()
    times, ratios = race(steps, config.rounds, device)
    row = {"model": name, "batch": batch, "image_size": image_size}
    for way in ways:
        row[way] = {**times[way]._asdict(), "faster_than_eager": 1 / ratios[way],
                    "peak_mib": in_fresh_process(peak_mib, way, make, batch, image_size, device)}
    return row


def make_step(way, make, batch, image_size, device):
    torch.manual_seed(0)
    model = make().to(device)
    if way == "fused":
        fuse(model)
    if way == "compile":
        model.compile()
    amp = torch.float16 if device.type == "cuda" else None
    images, labels = torch.rand(batch, 3, image_size, image_size, device=device), torch.randint(0, 2, (batch,), device=device)
    optimizer, scaler = make_optimizer(model, 1e-4, 0.0), torch.amp.GradScaler(device.type, enabled=amp is not None)
    return lambda: train_step(model, images, labels, optimizer, scaler, amp=amp, label_smoothing=0.0, clip_grad=None)


def in_fresh_process(f, *args):
    """f(*args) in a process that has done nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


def peak_mib(way, make, batch, image_size, device):
    """MiB that three training steps take at most, model and optimizer included: of GPU memory, or on the CPU of the process's
    (Linux), beyond what it had before the model was made."""
    before = peak_resident_mib()
    step = make_step(way, make, batch, image_size, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_resident_mib() - before


def peak_resident_mib():
    """getrusage would count what the parent had when it started this process."""
    return next(int(line.split()[1]) / 2**10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def as_markdown(result):
    e = result["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("python", "torch", "triton"))
    blocks = {}  # (shape, mode) -> a row for each way
    for row in result["blocks"]:
        blocks.setdefault((tuple(row["shape"]), row["mode"]), []).append(row)
    lines = [f"{e['device']}; {versions}; {result['dtype']}; {e['date']}; copy {result['copy_gb_s']:.0f} GB/s", "",
             "The block, with residual, in training: median [p20, p80] ms, times as fast as eager, GB/s of what must be moved", "",
             *table_head("N, C, map, K", "what", *dict.fromkeys(row["way"] for row in result["blocks"]))]
    for (shape, mode), rows in blocks.items():
        lines.append(table_line(named(shape), mode, *(
            f"{spread(r['ms'], r['p20'], r['p80'], '.3g')} {r['faster_than_eager']:.2f}x, {r['gb_s']:.1f}" for r in rows)))
    for (shape, mode), rows in blocks.items():
        if mode == "forward":
            lines.append(table_line(named(shape), "saved, KiB a sample", *(f"{r['saved_bytes_per_sample'] / 1024:.0f}" for r in rows)))
    if result["convs"]:
        lines += ["", "A depthwise conv's backward alone: median [p20, p80] ms", "",
                  "| N, C, map, K | PyTorch's | ours | times as fast |", "|---|---|---|--:|"]
        for row in result["convs"]:
            lines.append(table_line(named(row["shape"]), *(spread(**row[way], form=".3g") for way in ("aten", "ours")),
                                    f"{row['faster']:.1f}"))
    lines += ["", "A training step, forward + backward + Adam: median [p20, p80] ms, times as fast as eager; peak memory, MiB", "",
              *table_head("model, batch, image", "eager", "compile", "fused")]
    for row in result["steps"]:
        cells = [f"{spread(r['median'], r['p20'], r['p80'], '.0f')} {r['faster_than_eager']:.2f}x; {r['peak_mib']:,.0f}" if r else "not taken"
                 for r in map(row.get, ("eager", "compile", "fused"))]
        lines.append(table_line(f"{row['model']}, {row['batch']}, {row['image_size']}", *cells))
    return "\n".join(lines) + "\n"


def table_line(*cells):
    return f"| {' | '.join(cells)} |"


def table_head(*cells):
    return [table_line(*cells), "|" + "---|" * len(cells)]


def named(shape):
    N, C, side, K = shape
    return f"{N}, {C}, {side}x{side}, {K}"


def spread(median, p20, p80, form):
    return f"{median:{form}} [{p20:{form}}, {p80:{form}}]"


def say(text):
    print(f"measuring {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, sys.argv[1:])
