"""What bench.py measured -> markdown that reads well in a terminal of 120 columns."""
import statistics
import textwrap

from ..experiments import EPOCH_IMAGES, ROWS

WIDTH = 120
PUBLISHED = {row.title: row for row in ROWS}


def bench_text(result):
    """Everything `python bench.py` measured; `result` as in bench.json."""
    config = result["config"]
    size = f"{config['image_size']}x{config['image_size']}"
    what = f"batch {config['batch_size']}, {size} pixels, --kernels {config['kernels']}" + (", compiled" if config["compile"] else "")
    text = [heading(result, what), models_text(result["models"])]
    if "peers" in result:
        text.append(peers_text(result["peers"]))
    if "largest" in result:
        text.append(largest_text(result["largest"], config["max_batch"]))
    if "data" in result:
        text.append(data_text(result["data"], result["models"], config["batch_size"], config["data"]))
    return "\n\n".join(text) + "\n"


def kernels_text(result):
    """Everything `python bench.py --kernels-table` measured; `result` as in kernels.json."""
    copies = [row["copy_gb_s"] for row in result["blocks"] if "failed" not in row]
    copy = number(statistics.median_high(copies) if copies else None)
    text = [heading(result, f"batch as shown, copy {copy} GB/s"), blocks_text(result["blocks"])]
    if result["convs"]:
        text.append(convs_text(result["convs"]))
    return "\n\n".join([*text, steps_text(result["steps"])]) + "\n"


def heading(result, what):
    """Machine, versions, dtype, and the rest that a number is nothing without."""
    e, dtype = result["environment"], {"off": "float32", "fp16": "float16 autocast", "bf16": "bfloat16 autocast"}[result["config"]["amp"]]
    versions = ", ".join(f"{name} {e[name]}" for name in ("python", "torch", "triton", "cuda") if e[name])
    text = paragraph(f"{e['device']}; {versions}; {dtype}, {what}; {e['date']}.")
    if e["cuda"] is None:
        text += "\n" + paragraph("Taken on a CPU, with sizes that suit a CPU: nothing here speaks for a GPU.")
    return text


def paragraph(text):
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def aligned(head, rows, left=1):
    """A markdown table whose columns line up as plain text too; the first `left` columns are words, the others numbers."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(head, *rows)]

    def line(cells):
        return "| " + " | ".join(f"{cell:<{w}}" if i < left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths))) + " |"
    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def number(value):
    """Three digits, or all those before the point; nothing for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(median, p20, p80):
    return "{} [{}, {}]".format(*(number(value).replace(",", "") for value in (median, p20, p80)))


def failures(rows, name):
    """A line for each row that failed."""
    return [paragraph(f"{row[name]}, batch {row['batch_size']}: {row['failed']}") for row in rows if "failed" in row]


def models_text(rows):
    """The rows of the original table: time, then memory, what was published beside."""
    text = ["**Time.** Median [p20, p80] of a training step (forward, backward, Adam) and of inference.", "", time_table(rows), "",
            "**Memory**, MiB, training.", "", memory_table(rows)]
    if failures(rows, "row"):
        text += ["", *failures(rows, "row")]
    done = [row for row in rows if "failed" not in row]
    if done:
        matmul, copy = (statistics.median_high(row[rate] for row in done) for rate in ("matmul_gflop_s", "copy_gb_s"))
        text += ["", paragraph(
            f"s/epoch: of {EPOCH_IMAGES:,} images, computed. floor: the share of the step that it would take if nothing cost time but "
            f"3x the forward FLOPs at the rate of a large matrix product ({matmul / 1000:,.2f} TFLOP/s), or writing and reading once "
            f"what is saved for backward and Adam's state at that of a large copy ({copy:,.0f} GB/s), whichever is longer; both taken "
            "in turn with the step. GFLOP: forward of one image, counted. saved/image: what autograd keeps. allocated, reserved: "
            "PyTorch's peaks on CUDA. process: on CUDA all that the GPU has given away (mem_get_info), on a CPU the peak resident "
            "size; before: the same before there was a model."), paragraph(
            "2080: as published in 2021, s/epoch and MiB of one RTX 2080 (8 GB), batch 250, fp16, JPEG decoding included, memory as "
            "nvidia-smi shows it.")]
    return "\n".join(text)


def time_table(rows):
    lines = []
    for row in rows:
        if "failed" in row:
            ours = [in_a_word(row), *[""] * 5]
        else:
            training, inference = (spread(*(row[f"{what}_{t}"] for t in ("ms", "p20", "p80"))) for what in ("training", "inference"))
            ours = [training, number(row["training_images_per_s"]), number(row[f"seconds_per_{EPOCH_IMAGES}_images"]),
                    f"{row['share_of_floor']:.0%}", inference, number(row["inference_images_per_s"])]
        lines.append([row["row"], *ours, PUBLISHED[row["row"]].published_epoch_s])
    return aligned(["row", "train, ms", "images/s", "s/epoch", "floor", "infer, ms", "images/s", "2080 s"], lines)


def memory_table(rows):
    lines = []
    for row in rows:
        if "failed" in row:
            ours = [in_a_word(row), "", row["batch_size"], *[""] * 5]
        else:
            ours = [f"{row['parameters']:,}", number(row["gflop_per_image"]), row["batch_size"], number(row["saved_mib_per_image"]),
                    *(number(row[f"{what}_mib"]) for what in ("allocated", "reserved", "process", "before"))]
        lines.append([row["row"], *ours, f"{PUBLISHED[row['row']].published_mib:,}"])
    return aligned(["row", "parameters", "GFLOP", "batch", "saved/image", "allocated", "reserved", "process", "before", "2080 MiB"], lines)


def in_a_word(row):
    return "out of memory" if "out of memory" in row["failed"] else "failed"


def peers_text(rows):
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["row"], row["way"], "failed", "", "", ""])
            continue
        ratios = [f"{row[ratio]:.2f}" if ratio in row else "" for ratio in ("time_ratio", "memory_ratio")]
        lines.append([row["row"], row["way"], spread(row["ms"], row["p20"], row["p80"]), ratios[0],
                      number(row["training_mib"]), ratios[1]])
    text = ["**Peers.** Training steps taken in turn; ours / peer: below 1, ours takes less.", "",
            aligned(["row", "what", "ms", "ours / peer, time", "MiB", "ours / peer, memory"], lines, left=2)]
    return "\n".join([*text, "", paragraph("MiB: peak of three steps in a fresh process: allocated tensors on CUDA, on a CPU what the process "
                                           "grew by. The linear ViTs are the same network to a peer."),
                      *failures([{**row, "row": f"{row['row']}, {row['way']}"} for row in rows], "row")])


def data_text(stages, models, batch, name):
    """Each stage, then the training steps that it must feed."""
    def per_second(milliseconds):
        return 1000 * batch / milliseconds
    lines = [[row["stage"], spread(row["images_per_s"], row["p20"], row["p80"]), number(1000 * batch / row["images_per_s"])]
             for row in stages if "failed" not in row]
    lines += [[f"training step, {row['row']}", spread(*(per_second(row[f"training_{t}"]) for t in ("ms", "p80", "p20"))),
               number(row["training_ms"])] for row in models if "failed" not in row]
    return "\n".join([f"**Data**, {name}, beside the training steps that it must feed; decoding and packing happen once.", "",
                      aligned(["stage", "images/s", f"ms for {batch} images"], lines), *failures(stages, "stage")])


def largest_text(rows, budget):
    lines = [[row["row"], in_a_word(row) if "failed" in row else row["largest_batch"], f"{PUBLISHED[row['row']].published_mib:,}"]
             for row in rows]
    return "\n".join([f"**The largest batch** that trains in {budget:g} GB, CUDA context included, found by trying.", "",
                      aligned(["row", "batch", "2080 MiB at batch 250"], lines), *failures(rows, "row")])


def blocks_text(rows):
    """The fused block: a line for each shape and way, forward beside forward + backward."""
    lines, last, pairs = [], None, {}

    def rate(gb_s):
        return f"{gb_s:.1f}" if gb_s < 100 else f"{gb_s:.0f}"
    for row in rows:
        pairs.setdefault((tuple(row["shape"]), row.get("way", "failed")), {})[row.get("mode")] = row
    for (shape, way), modes in pairs.items():
        if way == "failed":
            lines.append([shape_text(shape), way, *[""] * 7])
            continue
        cells = []
        for row in modes.values():
            cells += [spread(row["ms"], row["p20"], row["p80"]), f"{row['faster_than_eager']:.2f}x", rate(row["gb_s"])]
        lines.append([shape_text(shape) if shape != last else "", way, *cells, f"{row['saved_bytes_per_sample'] / 1024:.0f}"])
        last = shape
    return "\n".join(["**The block**, with residual, in training: median [p20, p80], times as fast as eager, GB/s of "
                      "what must be moved,", "KiB a sample that autograd keeps.", "",
                      aligned(["N, C, map, K", "way", "forward, ms", "", "GB/s", "and backward, ms", "", "GB/s", "KiB"], lines, left=2),
                      *failures([{**row, "shape": shape_text(row["shape"])} for row in rows], "shape")])


def convs_text(rows):
    lines = []
    for row in rows:
        figures = ["failed", "", ""] if "failed" in row else [
            *(spread(*(row[f"{way}_{part}"] for part in ("median", "p20", "p80"))) for way in ("aten", "ours")), f"{row['faster']:.1f}x"]
        lines.append([shape_text(row["shape"]), *figures])
    return "\n".join(["**A depthwise conv's backward alone**, ms.", "", aligned(["N, C, map, K", "PyTorch's", "ours", "faster"], lines),
                      *failures([{**row, "shape": shape_text(row["shape"])} for row in rows], "shape")])


def steps_text(rows):
    lines = []
    for row in rows:
        figures = ["failed", "", ""] if "failed" in row else [
            spread(row["ms"], row["p20"], row["p80"]), f"{row['faster']:.2f}x" if row["faster"] else "-", number(row["training_mib"])]
        lines.append([f"{row['model']}, batch {row['batch_size']}, {row['image_size']} px", row["way"], *figures])
    return "\n".join(["**A training step**, forward, backward, Adam: median [p20, p80], times as fast as eager, peak memory.", "",
                      aligned(["model", "way", "ms", "", "MiB"], lines, left=2),
                      *failures([{**row, "model": f"{row['model']}, {row['way']}"} for row in rows], "model")])


def shape_text(shape):
    N, C, side, K = shape
    return f"{N}, {C}, {side}x{side}, {K}"
