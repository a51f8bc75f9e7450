"""Measure what the models and the kernels take on this machine: time, memory, FLOPs, beside the machine's own limits.

python bench.py
python bench.py --rows convmixer-p24,vit_cnn-p24 --peers
python bench.py --data dogs-vs-cats.zip --out results/here
python bench.py --kernels-table
"""
from mixer.runtime import signals

if __name__ == "__main__":
    signals.listen()  # before torch, which takes seconds to import

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kernels import DepthwiseGELUBN, depthwise_cpu, pick_kernels, why_not_triton
from mixer.report import tables
from mixer.runtime.cli import option, parse, run, wrong_values
from mixer.data.images import find_images
from mixer.runtime.device import pick_amp, pick_hardware
from mixer.runtime.distributed import rank_and_size
from mixer.runtime.errors import InputError, UsageError
from mixer.experiments import ROWS
from mixer.runtime.files import writable_folder, write_csv, write_json, write_text
from mixer.bench.measure import Load, compare_training, largest_batch, measure_data, saved_bytes, times_and_floor, visit_model
from mixer.models import create_model, did_you_mean, model_options
from mixer.models.convmixer import depthwise_unit
from mixer.runtime.processes import attempt
from mixer.report.runs import draw_memory, draw_speed, environment
from mixer.bench.timing import captured, copy_bandwidth, race, settle_allocator


@dataclass(frozen=True)
class Config:
    """Every option of bench.py."""

    rows: str | None = option(None, "which of the nine rows, with commas between; default: all, as resnet18,convmixer-p24")
    peers: bool = option(False, "also what you would otherwise take, from torchvision and timm, eager and compiled, in turn with ours")
    data: str | None = option(None, "image folder or zip: also how fast it is decoded, packed, read and augmented")
    max_batch: float | None = option(None, "also the largest batch that trains in so many GB of GPU memory", above=0)
    kernels_table: bool = option(False, "instead: the fused depthwise block against plain PyTorch, eager and compiled")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto: the GPU where there is one")
    batch_size: int | None = option(None, "images per step; default: the original's 250, on a CPU 8", least=2)
    image_size: int = option(192, "pixels square", least=1)
    amp: str = option("auto", "autocast dtype; auto: fp16 on CUDA, off on the CPU", choices=("auto", "fp16", "bf16", "off"))
    compile: bool = option(False, "torch.compile the models")
    kernels: str = option("auto", "ConvMixer's depthwise unit: fused (auto; triton: in Triton or not at all) or in plain PyTorch",
                          choices=("auto", "torch", "triton"))
    repeats: int = option(12, "times that each thing is taken, in turn with what it is compared to", least=3)
    out: str | None = option(None, "folder for csv, json, markdown and figures; default: print only")
    debug: bool = option(False, "show a traceback when something fails")


# N, C, side, K: ConvMixer at patch 24 and 16, ImageNet ConvMixers, and a small kernel, where PyTorch is good
SHAPES = {
    "cuda": [(250, 512, 8, 9), (250, 512, 12, 9), (64, 1024, 16, 9), (64, 768, 32, 7), (64, 1536, 32, 9), (250, 512, 8, 3), (8, 64, 12, 9)],
    "cpu": [(32, 512, 8, 9), (32, 512, 12, 9), (8, 1024, 16, 9), (2, 768, 32, 7), (32, 512, 8, 3), (8, 64, 12, 9)],
}
VISITS = 3  # fresh processes that share a row's repeats, minutes apart: the spread then holds what differs between such
FOR_MODELS = {"rows", "peers", "data", "max_batch", "batch_size", "image_size", "compile", "kernels"}  # no --kernels-table with these


def main(argv):
    config, rows, device = read_config(argv)
    out = config.out and writable_folder(config.out, "--out")
    lists = (measure_kernels if config.kernels_table else measure_models)(config, rows, device)
    told = {**dataclasses.asdict(config), "out": None, "data": config.data and Path(config.data).name}  # a result tells of no folders
    result = {"environment": environment(device), "config": told, **lists}
    text = (tables.kernels_text if config.kernels_table else tables.bench_text)(result)
    print(text)
    if out:
        name = "kernels" if config.kernels_table else "bench"
        write_json(out / f"{name}.json", result)
        write_text(out / f"{name}.md", text)
        for part, measured in lists.items():
            write_csv(out / f"{part}.csv", flat(measured))
        if lists.get("memory"):
            caption = text.split("\n\n")[0]
            draw_speed(out / "speed.png", [row for row in lists["models"] if "failed" not in row], caption)
            draw_memory(out / "memory.png", lists["memory"], caption)
    failed = sum("failed" in row for measured in lists.values() for row in measured)
    if failed:
        raise RuntimeError(f"{failed} of the measurements failed; the tables say why")


def read_config(argv):
    """argv -> Config with its defaults filled in, the rows to measure, the device. Raises InputError naming all that is wrong."""
    given, wrong = parse(Config, argv, __doc__)
    config = Config(**given)
    wrong += wrong_values(config)
    names = {row.name: row for row in ROWS}
    asked = config.rows.split(",") if config.rows else list(names)
    wrong += [f"--rows: there is no {name}{did_you_mean(name, names)}; there are {', '.join(names)}" for name in asked if name not in names]
    rows = [names[name] for name in asked if name in names]
    for row in [] if wrong else rows:
        try:
            model_options(row.arch, config.image_size, **row.options)
        except ValueError as e:
            wrong.append(f"--image-size does not suit {row.name}: {e}; --rows takes others")
    if config.kernels_table:
        wrong += [f"--{name.replace('_', '-')} is of the models' table, not of --kernels-table" for name in given if name in FOR_MODELS]
    if rank_and_size()[1] > 1:
        wrong.append("bench.py measures a single process: start it without torchrun")
    if wrong:
        raise UsageError(wrong)
    device, amp = pick_hardware(config, why_not_triton)
    if config.max_batch and device.type != "cuda":
        raise InputError("--max-batch: only the memory of a GPU can be given out so exactly; this device is the CPU")
    if config.max_batch and config.max_batch * 1e9 > torch.cuda.get_device_properties(device).total_memory:
        raise InputError(f"--max-batch {config.max_batch:g}: {torch.cuda.get_device_name(device)} has less memory")
    if config.data:
        find_images(config.data)  # now, not after the models
    amp = {torch.float16: "fp16", torch.bfloat16: "bf16", None: "off"}[amp]
    return dataclasses.replace(config, amp=amp, batch_size=config.batch_size or (250 if device.type == "cuda" else 8)), rows, device


def measure_models(config, rows, device):
    """{list: its rows}: the nine rows of the table, their memory over batch sizes, and what else was asked for."""
    load = Load(config.batch_size, config.image_size, device, pick_amp(config.amp, device))
    makes = {row.title: partial(build, row.arch, row.options, config.image_size, device, config.kernels, config.compile) for row in rows}
    models, memory = measure_rows(config, makes, load)
    lists = {"models": models, "memory": memory}
    if config.peers:
        lists["peers"] = measure_peers(config, rows, load)
    if config.max_batch:
        lists["largest"] = []
        for title, make in makes.items():
            say(f"the largest batch of {title}")
            found, failed = attempt(largest_batch, make, load, int(config.max_batch * 1e9), debug=config.debug)
            lists["largest"].append({"row": title, "batch_size": config.batch_size, "largest_batch": found, **failed})
    if config.data:
        say(config.data)
        stages, failed = attempt(measure_data, config.data, load, config.repeats, debug=config.debug)
        lists["data"] = stages or [{"stage": Path(config.data).name, "batch_size": config.batch_size, **failed}]
    return lists


def measure_rows(config, makes, load):
    """The table's rows, and their memory over batch sizes: rows in turn, each in VISITS fresh processes."""
    batches = [config.batch_size] if config.compile else sorted({max(2, config.batch_size // part) for part in (4, 2, 1)})
    rows = {title: {"row": title, "batch_size": config.batch_size} for title in makes}
    times, memory = {title: {} for title in makes}, []
    for visit in range(VISITS):
        for title, make in makes.items():
            if "failed" in rows[title]:
                continue
            say(f"{title}, visit {visit + 1} of {VISITS}")
            result, failed = attempt(visit_model, make, load, config.repeats // VISITS, [] if visit else batches, debug=config.debug)
            counts, at_batches, taken = result or ({}, [], {})
            rows[title] |= {**counts, **failed}
            memory += [{"row": title, **at_batch} for at_batch in at_batches]
            for what, milliseconds in taken.items():
                times[title].setdefault(what, []).extend(milliseconds)
    for title, row in rows.items():
        if "failed" not in row:
            row |= times_and_floor(row, times[title])
    return list(rows.values()), memory


def build(arch, options, image_size, device, kernels, compile):
    """A model of ours, on the device, with the kernels of --kernels."""
    model = create_model(arch, image_size=image_size, **options).to(device)
    pick_kernels(kernels, model, device)
    if compile:
        model.compile()
    return model


def build_peer(arch, options, image_size, device, compile):
    """What others offer for a row: torchvision's ResNet-18, timm's of the other architectures, with the same options, 2 classes."""
    if arch == "resnet18":
        from torchvision.models import resnet18
        model = resnet18(num_classes=2)
    elif arch == "efficientnetv2_b0":
        from timm import create_model as timm_model
        model = timm_model("tf_efficientnetv2_b0", num_classes=2)
    elif arch == "convmixer":
        from timm.models.convmixer import ConvMixer
        model = ConvMixer(dim=512, depth=options.get("depth", 4), kernel_size=9, patch_size=options["patch"], num_classes=2)
    else:
        from timm.models.vision_transformer import VisionTransformer
        model = VisionTransformer(img_size=image_size, patch_size=options["patch"], embed_dim=512, depth=4, num_heads=8,
                                  qkv_bias=False, num_classes=2)
    model = model.to(device)
    if compile:
        model.compile()
    return model


def measure_peers(config, rows, load):
    """Of each row: ours as the table has it, and its peer, eager and compiled, with time_ratio and memory_ratio ours / peer."""
    measured = []
    for row in rows:
        package = "torchvision" if row.arch == "resnet18" else "timm"
        if row.arch == "vit_linear":  # the same network as vit_cnn
            continue
        if not importlib.util.find_spec(package):
            print(f"no peer for {row.title}: it needs {package} (pip install {package})", file=sys.stderr)
            continue
        say(f"{row.title} and {package}'s")
        of = row.arch, row.options, config.image_size, load.device
        makes = {"ours": partial(build, *of, config.kernels, config.compile), package: partial(build_peer, *of, False),
                 f"{package}, compiled": partial(build_peer, *of, True)}
        ours, *others = compare_training(makes, load, config.repeats, config.debug)
        for way in others:
            if not {"failed"} & {*ours, *way}:
                way |= {"time_ratio": way["faster"], "memory_ratio": ours["training_mib"] / way["training_mib"]}
        measured += [{"row": row.title, **way} for way in (ours, *others)]
    return measured


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


def build_timm(name, kernels, device):
    from timm import create_model as timm_model
    model = timm_model(name).to(device)
    pick_kernels(kernels, model, device)
    return model


class Block(nn.Module):
    """ConvMixer's depthwise unit and its residual, in plain PyTorch."""

    def __init__(self, C, K):
        super().__init__()
        self.fn = depthwise_unit(C, K)

    def forward(self, x):
        return self.fn(x) + x


def block_ways(C, K, device):
    """{name: (module, memory format)}: one block, with residual, in the ways that a user has."""
    def compiled(**options):
        model = Block(C, K).to(device)
        model.compile(options=options or None)
        return model
    return {
        "eager": (Block(C, K).to(device), torch.contiguous_format),
        "eager NHWC": (Block(C, K).to(device, memory_format=torch.channels_last), torch.channels_last),
        "compile": (compiled(), torch.contiguous_format),
        "compile NCHW": (compiled(layout_optimization=False), torch.contiguous_format),
        "fused": (DepthwiseGELUBN(C, K, residual=True).to(device), torch.contiguous_format),
    }


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


def flat(rows):
    """Rows for a csv file: the same keys in each, shapes as words."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: tables.shape_text(row[key]) if key == "shape" else row.get(key) for key in keys} for row in rows]


def say(text):
    print(f"measuring {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, sys.argv[1:])
