"""What bench.py measured -> markdown that reads well in a terminal of 120 columns."""
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence

from ..experiments import EPOCH_IMAGES, ROWS
from .measurements import Measurement, from_json

WIDTH = 120
PUBLISHED = {row.title: row for row in ROWS}
# of resolution.json: what is compared over the image sizes, its unit, its value
PER_IMAGE = {
    "Time": ("ms of a training step per image", lambda m: m.speed.training_ms / m.batch_size),
    "Memory": ("MiB per image, kept for the backward pass",
               lambda m: m.counts.saved_mib_per_image),
    "FLOPs": ("GFLOP of a forward pass of one image", lambda m: m.counts.gflop_per_image),
}
DTYPES = {"off": "float32", "fp16": "float16 autocast", "bf16": "bfloat16 autocast"}


def bench_text(result: dict) -> str:
    """Everything that `python bench.py` measured; `result` as in bench.json."""
    config, lists = result["config"], from_json(result)
    settings = (f"batch {config['batch_size']}, {config['image_size']}x{config['image_size']} "
                f"pixels, --kernels {config['kernels']}")
    if config["compile"]:
        settings += ", compiled"
    text = [heading(result, settings), models_text(lists["models"])]
    if "peers" in lists:
        text.append(peers_text(lists["peers"]))
    if "data" in lists:
        text.append(data_text(lists["data"], lists["models"], config))
    return "\n\n".join(text) + "\n"


def resolution_text(result: dict) -> str:
    """Everything that `python bench.py --image-size 192,288` measured; as in resolution.json."""
    config, measured = result["config"], from_json(result)["resolution"]
    settings = f"batch {config['batch_size']}, --kernels {config['kernels']}"
    if config["compile"]:
        settings += ", compiled"
    text = [heading(result, settings)]
    for quantity, (title, value) in PER_IMAGE.items():
        lines = []
        for row, sizes in by_row(measured).items():
            cells = [in_a_word(m) if m.failed else number(value(m)) for m in sizes]
            lines.append([row, *cells, number(growth(sizes, value))])
        sides = dict.fromkeys(f"{m.image_size} px" for m in measured)
        text.append(f"**{quantity}**, {title}.\n\n" + aligned(["row", *sides, "exponent"], lines))
    text.append(paragraph(
        "exponent: e in side^e, fitted through the sizes by least squares of the logarithms: 2 is "
        "as the number of pixels, 4 as its square. The parameters do not grow, but for the "
        "positions of a ViT."))
    text += failure_lines(measured, lambda m: f"{m.row}, {m.image_size} px")
    return "\n\n".join(text) + "\n"


def by_row(measured: list[Measurement]) -> dict[str, list[Measurement]]:
    """{row: its measurements}, each in the order of the list."""
    rows = {}
    for m in measured:
        rows.setdefault(m.row, []).append(m)
    return rows


def growth(sizes: list[Measurement], value: Callable[[Measurement], float]) -> float | None:
    """The exponent e of value = a * side^e; None with fewer than two sizes that did not fail."""
    points = [(math.log(m.image_size), math.log(value(m))) for m in sizes if not m.failed]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def kernels_text(result: dict) -> str:
    """Everything that `python bench.py --kernels-table` measured; `result` as in kernels.json."""
    lists = from_json(result)
    copies = [m.copy_gb_s for m in lists["blocks"] if not m.failed]
    copy = number(statistics.median_high(copies) if copies else None)
    text = [heading(result, f"batch as shown, copy {copy} GB/s"), blocks_text(lists["blocks"])]
    if lists["shapes"]:
        text.append(shapes_text(lists["shapes"]))
    return "\n\n".join([*text, steps_text(lists["steps"])]) + "\n"


def static_text(result: dict) -> str:
    """Everything that `python bench.py --kernels-static` found; `result` as in static.json."""
    launches, env = from_json(result)["launches"], result["environment"]
    done = [m for m in launches if not m.failed]
    detailed = [m for m in done if m.capability == 90]
    return "\n".join([
        paragraph(f"torch {env['torch']}, triton {env['triton']}; float16; {env['date']}. "
                  "ESTIMATES from the compiled machine code: no GPU was there."), "",
        paragraph("**Each launch** on an H200 (sm_90), training: registers and bytes spilled per "
                  "thread, KiB of shared memory per program, programs on an SM, rounds; "
                  "instructions and bytes per element; the resource that takes longest. floor: the "
                  "longer of the bytes that must pass DRAM and the matrix products."), "",
        aligned(["N, C, map, K", "kernel", "regs", "spill", "KiB", "/SM", "rounds", "instr", "L2 B",
                 "DRAM B", "us", "floor", "binds"],
                [[shape_text(m.shape), m.kernel, m.registers, m.spilled_bytes,
                  m.shared_bytes // 1024, m.programs_per_sm, m.rounds,
                  f"{m.instructions.instructions:.1f}", f"{m.l2_bytes:.1f}", f"{m.dram_bytes:.1f}",
                  number(m.estimate_us), number(m.floor_us), m.binds] for m in detailed], left=2),
        "", "**Its instructions per element**, by class.", "",
        aligned(["N, C, map, K", "kernel", *vars(detailed[0].instructions)] if detailed else [],
                [[shape_text(m.shape), m.kernel,
                  *(f"{n:.1f}" for n in vars(m.instructions).values())] for m in detailed], left=2),
        "", "**A layer**, forward and backward, us: estimate (floor).", "", layers_table(done),
        *failure_lines(launches, lambda m: f"{shape_text(m.shape)}, sm_{m.capability}")]) + "\n"


def layers_table(launches: list[Measurement]) -> str:
    """A line per shape and GPU: all launches forward, all backward, and their sum."""
    layers = {}
    for m in launches:
        way = "backward" if m.kernel.startswith("backward") else "forward"
        sums = layers.setdefault((tuple(m.shape), m.gpu), {"forward": [0, 0], "backward": [0, 0]})
        sums[way] = [sums[way][0] + m.estimate_us, sums[way][1] + m.floor_us]

    def cell(estimate, floor):
        return f"{number(estimate)} ({number(floor)})"
    return aligned(["N, C, map, K", "GPU", "forward", "backward", "both"],
                   [[shape_text(shape), gpu, cell(*sums["forward"]), cell(*sums["backward"]),
                     cell(*map(sum, zip(*sums.values(), strict=True)))]
                    for (shape, gpu), sums in layers.items()], left=2)


def tune_text(result: dict) -> str:
    """Everything that `python bench.py --kernels-tune` measured; `result` as in tune.json."""
    tiles, env = from_json(result)["tiles"], result["environment"]
    lines = [[shape_text(m.shape), m.mode or "", knobs_text(m.knobs),
              *(["failed", "", ""] if m.failed else [
                  spread(*(1000 * t for t in (m.ms, m.p20, m.p80))),
                  number(m.estimate_ms and 1000 * m.estimate_ms), f"{m.faster:.2f}x"])]
             for m in tiles]
    return "\n".join([
        paragraph(f"{env['device']}; torch {env['torch']}, triton {env['triton']}; float16, with "
                  f"residual, in training; {env['date']}. us: median [p20, p80]; speed relative to "
                  "the launcher's own choice."), "",
        aligned(["N, C, map, K", "pass", "instead", "us", "estimate", ""], lines, left=3),
        *failure_lines(tiles, lambda m: f"{shape_text(m.shape)}, {m.mode}, {knobs_text(m.knobs)}"),
        ]) + "\n"


def knobs_text(knobs: dict | None) -> str:
    return " ".join(f"{name}={value}" for name, value in (knobs or {}).items())


def fastest_tiles(result: dict) -> dict:
    """The contents of depthwise_tiles.json for one GPU: what beats the launcher by 3 %."""
    fastest = {}
    for m in from_json(result)["tiles"]:
        N, C, side, K = m.shape
        name = f"{m.mode}, {side}x{side}, K {K}, float16"
        if not m.failed and m.knobs and m.faster > fastest.get(name, (1.03,))[0]:
            fastest[name] = m.faster, m.knobs
    env = result["environment"]
    return {env["device"]: {"date": env["date"], "triton": env["triton"],
                            "tiles": {name: knobs for name, (_, knobs) in fastest.items()}}}


def heading(result: dict, settings: str) -> str:
    """Machine, versions, dtype and settings: everything needed to interpret a number."""
    env, dtype = result["environment"], DTYPES[result["config"]["amp"]]
    versions = ", ".join(f"{name} {env[name]}" for name in ("python", "torch", "triton", "cuda")
                         if env[name])
    text = paragraph(f"{env['device']}; {versions}; {dtype}, {settings}; {env['date']}.")
    if env["cuda"] is None:
        text += "\n" + paragraph("Measured on a CPU, with sizes that suit a CPU: these numbers say "
                                 "nothing about GPUs.")
    return text


def models_text(models: list[Measurement]) -> str:
    """The rows of the original table: time, then memory, beside what was published."""
    text = ["**Time.** Median [p20, p80] of a training step (forward, backward, Adam) and of "
            "inference.", "", time_table(models), "",
            "**Memory**, MiB, training.", "", memory_table(models)]
    failures = failure_lines(models, lambda m: m.row)
    if failures:
        text += ["", *failures]
    speeds = [m.speed for m in models if not m.failed]
    if speeds:
        matmul = statistics.median_high(s.matmul_gflop_s for s in speeds) / 1000
        copy = statistics.median_high(s.copy_gb_s for s in speeds)
        text += ["", paragraph(
            f"s/epoch: seconds for {EPOCH_IMAGES:,} images, computed from images/s. floor: the "
            "least possible time of a training step, as a share of its measured time. The least "
            "time is the longer of two: 3x the forward FLOPs at the rate of a large matrix product "
            f"({matmul:,.2f} TFLOP/s), or writing and reading once the tensors saved for backward, "
            "the gradients, the weights and Adam's moments at the rate of a large copy "
            f"({copy:,.0f} GB/s). Both rates are measured in turn with the step. GFLOP: forward "
            "pass of one image, counted. saved/image: what autograd keeps for the backward pass. "
            "allocated, reserved: PyTorch's peaks, on CUDA only. process: on CUDA the total GPU "
            "memory in use (mem_get_info), on a CPU the peak resident size. before: the same, "
            "before the model is created."), paragraph(
            "2080: as published in 2021 for one RTX 2080 (8 GB): s/epoch and MiB, batch 250, fp16, "
            "JPEG decoding included, memory as nvidia-smi shows it.")]
    return "\n".join(text)


def time_table(models: list[Measurement]) -> str:
    lines = []
    for m in models:
        s = m.speed
        cells = [in_a_word(m), *[""] * 5] if m.failed else [
            spread(s.training_ms, s.training_p20, s.training_p80), number(s.training_images_per_s),
            number(s.seconds_per_25000_images), f"{s.share_of_floor:.0%}",
            spread(s.inference_ms, s.inference_p20, s.inference_p80),
            number(s.inference_images_per_s)]
        lines.append([m.row, *cells, PUBLISHED[m.row].published_epoch_s])
    return aligned(["row", "train, ms", "images/s", "s/epoch", "floor", "infer, ms", "images/s",
                    "2080 s"], lines)


def memory_table(models: list[Measurement]) -> str:
    lines = []
    for m in models:
        cells = [in_a_word(m), "", m.batch_size, *[""] * 5] if m.failed else [
            f"{m.counts.parameters:,}", number(m.counts.gflop_per_image), m.batch_size,
            number(m.counts.saved_mib_per_image), number(m.memory.allocated_mib),
            number(m.memory.reserved_mib), number(m.memory.process_mib),
            number(m.memory.before_mib)]
        lines.append([m.row, *cells, f"{PUBLISHED[m.row].published_mib:,}"])
    return aligned(["row", "parameters", "GFLOP", "batch", "saved/image", "allocated", "reserved",
                    "process", "before", "2080 MiB"], lines)


def peers_text(peers: list[Measurement]) -> str:
    def ratio(value):
        return "" if value is None else f"{value:.2f}"
    lines = [[m.row, m.way, *(["failed", "", "", ""] if m.failed else [
        spread(m.ms, m.p20, m.p80), ratio(m.time_ratio),
        number(m.memory and m.memory.training_mib), ratio(m.memory_ratio)])] for m in peers]
    return "\n".join([
        "**Peers.** Training steps, timed in turn. ours / peer below 1: ours takes less.", "",
        aligned(["row", "candidate", "ms", "ours / peer, time", "MiB", "ours / peer, memory"],
                lines, left=2), "",
        paragraph("MiB: peak over three steps in a fresh process: on CUDA of allocated tensors, on "
                  "a CPU the growth of the process. Plain fp32: the peer as users run it, with the "
                  "default allocator, against ours as train.py starts it. The linear ViTs are "
                  "left out, because they are the same network as the CNN ViTs."),
        *failure_lines(peers, lambda m: f"{m.row}, {m.way}")])


def data_text(stages: list[Measurement], models: list[Measurement], config: dict) -> str:
    """Each stage, then the training steps that it must feed."""
    batch = config["batch_size"]
    lines = [[m.stage, spread(m.images_per_s, m.p20, m.p80), number(1000 * batch / m.images_per_s)]
             for m in stages if not m.failed]
    for m in models:
        if not m.failed:
            ms = m.speed.training_ms, m.speed.training_p80, m.speed.training_p20
            lines.append([f"training step, {m.row}", spread(*(1000 * batch / t for t in ms)),
                          number(m.speed.training_ms)])
    return "\n".join([
        paragraph(f"**Data**, {config['data']}: the stages, and the training steps that they must "
                  "feed. Decoding and packing happen once."), "",
        aligned(["stage", "images/s", f"ms for {batch} images"], lines),
        *failure_lines(stages, lambda m: m.stage)])


def blocks_text(blocks: list[Measurement]) -> str:
    """The fused block: a line per shape and candidate, forward beside forward + backward."""
    modes = {}  # {(shape, candidate): its measurements}
    for m in blocks:
        modes.setdefault((tuple(m.shape), m.way), []).append(m)

    lines, last = [], None
    for (shape, candidate), measured in modes.items():
        if candidate is None:
            lines.append([shape_text(shape), "failed", *[""] * 7])
            continue
        line = [shape_text(shape) if shape != last else "", candidate]
        for m in measured:
            line += [spread(m.ms, m.p20, m.p80), f"{m.faster_than_eager:.2f}x",
                     f"{m.gb_s:.1f}" if m.gb_s < 100 else f"{m.gb_s:.0f}"]
        lines.append([*line, f"{measured[0].saved_bytes_per_sample / 1024:.0f}"])
        last = shape
    return "\n".join([
        paragraph("**The block**, with residual, in training: median [p20, p80], speed relative to "
                  "eager, GB/s of the bytes that must be read and written, KiB per sample that "
                  "autograd keeps."), "",
        aligned(["N, C, map, K", "candidate", "forward, ms", "", "GB/s", "and backward, ms", "",
                 "GB/s", "KiB"], lines, left=2),
        *failure_lines(blocks, lambda m: shape_text(m.shape))])


def shapes_text(shapes: list[Measurement]) -> str:
    """A line per kernel size and dtype: the lowest speed, where it is, and the median."""
    groups = {}  # {(K, dtype, mode): measurements}
    for m in shapes:
        if not m.failed:
            groups.setdefault((m.shape[3], m.dtype, m.mode), []).append(m)
    lines = []
    for K, dtype in dict.fromkeys(key[:2] for key in groups):
        lines.append([f"{K}, {dtype}"])
        for mode in ("training", "evaluation"):
            measured = sorted(groups[K, dtype, mode], key=lambda m: m.faster)
            lowest, median = measured[0], measured[len(measured) // 2]
            lines[-1] += [f"{lowest.faster:.2f}x", shape_text(lowest.shape),
                          f"{median.faster:.2f}x"]
    return "\n".join([
        paragraph("**The block in many shapes**: fused, relative to eager. The lowest speed, where "
                  "it is, and the median."), "",
        aligned(["K, dtype", "training", "at", "median", "evaluation", "at", "median"], lines),
        *failure_lines(shapes, lambda m: shape_text(m.shape))])


def steps_text(steps: list[Measurement]) -> str:
    lines = [[f"{m.model}, batch {m.batch_size}, {m.image_size} px", m.way,
              *(["failed", "", ""] if m.failed else [
                  spread(m.ms, m.p20, m.p80), f"{m.faster:.2f}x" if m.faster else "-",
                  number(m.memory.training_mib)])] for m in steps]
    return "\n".join(["**A training step**, forward, backward, Adam: median [p20, p80], speed "
                      "relative to eager, peak memory.", "",
                      aligned(["model", "candidate", "ms", "", "MiB"], lines, left=2),
                      *failure_lines(steps, lambda m: f"{m.model}, {m.way}")])


def aligned(head: Sequence, rows: Sequence[Sequence], left: int = 1) -> str:
    """A markdown table whose columns line up as plain text too.

    The first `left` columns are words, the others numbers.
    """
    columns = list(zip(head, *rows, strict=True))
    widths = [max(len(str(cell)) for cell in column) for column in columns]

    def line(cells):
        padded = [f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
                  for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"
    dashes = ["-" * (width + 2) if i < left else "-" * (width + 1) + ":"
              for i, width in enumerate(widths)]
    return "\n".join([line(head), f"|{'|'.join(dashes)}|", *map(line, rows)])


def paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def number(value: float | None) -> str:
    """Three digits, or all those before the point; `-` for None."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def spread(median: float, p20: float, p80: float) -> str:
    median, p20, p80 = (number(value).replace(",", "") for value in (median, p20, p80))
    return f"{median} [{p20}, {p80}]"


def shape_text(shape: Sequence[int]) -> str:
    N, C, side, K = shape
    return f"{N}, {C}, {side}x{side}, {K}"


def csv_rows(rows: list[dict]) -> list[dict]:
    """The same rows, each with all keys, and shapes as text."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: shape_text(row[key]) if key == "shape" else row.get(key) for key in keys}
            for row in rows]


def in_a_word(m: Measurement) -> str:
    return "out of memory" if "out of memory" in m.failed else "failed"


def failure_lines(measured: list[Measurement], label: Callable[[Measurement], str]) -> list[str]:
    """A paragraph for each measurement that failed."""
    return [paragraph(f"{label(m)}, batch {m.batch_size}: {m.failed}")
            for m in measured if m.failed]
