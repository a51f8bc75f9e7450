"""What bench.py measured, as in its json files -> markdown."""
import statistics

from ..experiments import BY_TITLE, EPOCH_IMAGES, RECIPE
from .tables import failures, filled, number, paragraph, shape_text, spread, table

DTYPES = {"off": "float32", "fp16": "float16 autocast", "bf16": "bfloat16 autocast"}
MS = spread("ms", "p20", "p80")
TIME = [("row", "{row}"), ("train, ms", spread("training_ms", "training_p20", "training_p80")),
        ("images/s", "{training_images_per_s}"), ("s/epoch", "{seconds_per_25000_images}"),
        ("floor", "{share_of_floor:.0%}"),
        ("infer, ms", spread("inference_ms", "inference_p20", "inference_p80")),
        ("images/s", "{inference_images_per_s}"),
        ("2080 s", "{published_epoch_s}")]
MEMORY = [("row", "{row}"), ("parameters", "{parameters:,}"), ("GFLOP", "{gflop_per_image}"),
          ("batch", "{batch_size}"), ("saved/image", "{saved_mib_per_image}"),
          ("training", "{training_mib}"), ("process", "{process_mib}"), ("before", "{before_mib}"),
          ("2080 MiB", "{published_mib:,}")]
PEERS = [("row", "{row}"), ("candidate", "{way}"), ("ms", MS),
         ("ours / peer, time", "{faster:.2f}"), ("MiB", "{training_mib}"),
         ("ours / peer, memory", "{memory_ratio:.2f}")]
DATA = [("stage", "{stage}"), ("images/s", spread("images_per_s", "p20", "p80"))]
BLOCKS = [("N, C, map, K", "{first}"), ("candidate", "{way}"), ("forward, ms", "{forward}"),
          ("", "{forward_faster:.2f}x"), ("GB/s", "{forward_gb_s}"),
          ("and backward, ms", "{backward}"), ("", "{backward_faster:.2f}x"),
          ("GB/s", "{backward_gb_s}"), ("KiB", "{kib:.0f}")]
SHAPES = [("K, dtype", "{K}, {dtype}"), *(
    (heading, f"{{{mode}_{key}}}") for mode in ("training", "evaluation")
    for heading, key in ((mode, "lowest"), ("at", "shape"), ("median", "median")))]
STEPS = [("model", "{model}, batch {batch_size}, {image_size} px"), ("candidate", "{way}"),
         ("ms", MS), ("", "{faster:.2f}x"), ("MiB", "{training_mib}")]


def bench_text(result: dict) -> str:
    """Everything that `python bench.py` measured; `result` as in bench.json."""
    config = result["config"]
    sizes = " and ".join(f"{side}x{side}" for side in config["image_size"])
    settings = (f"batch {config['batch_size']}, {sizes} pixels, --kernels {config['kernels']}"
                + (", compiled" if config["compile"] else ""))
    text = [heading(result, settings), *models_text(result["models"])]
    if "peers" in result:
        text.append(section(
            "**Peers.** Training steps, timed in turn. ours / peer below 1: ours takes less.",
            table(result["peers"], PEERS, left=2), "", paragraph(
                "MiB: peak over three steps in a fresh process: on CUDA of allocated tensors, on a "
                "CPU the growth of the process. Plain fp32: the peer as users run it, with the "
                "default allocator, against ours as train.py starts it. The linear ViTs are left "
                "out, because they are the same network as the CNN ViTs."),
            *failures(result["peers"], "{row}, {way}, batch {batch_size}")))
    if "data" in result:
        text.append(section(
            f"**Data**, {config['data']}: the stages that feed a training step. Decoding and "
            "packing happen once.", table(result["data"], DATA),
            *failures(result["data"], "{stage}")))
    return "\n\n".join(text) + "\n"


def section(text: str, table: str, *rest: str) -> str:
    return "\n".join([paragraph(text), "", table, *rest])


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


def models_text(models: list[dict]) -> list[str]:
    """The rows of the original table, at each image size: time, then memory."""
    done = [row for row in models if "failed" not in row]
    matmul, copy = (statistics.median_high([row[key] for row in done] or [0])
                    for key in ("matmul_gflop_s", "copy_gb_s"))

    # of several sizes, those of a row one below the other; published was one size
    titles, several = [row["row"] for row in models], len({row["image_size"] for row in models}) > 1
    lines = []
    for row in sorted(models, key=lambda row: titles.index(row["row"])):
        original = BY_TITLE.get(row["row"]) if row["image_size"] == RECIPE["image_size"] else None
        size = f", {row['image_size']} px" if several else ""
        lines.append({**(vars(original) if original else {}), **row, "row": row["row"] + size})
    return [
        "**Time.** Median [p20, p80] of a training step (forward, backward, Adam) and of "
        "inference.", table(lines, TIME), "**Memory**, MiB, training.", table(lines, MEMORY),
        paragraph(
            f"s/epoch: seconds for {EPOCH_IMAGES:,} images, computed from images/s. floor: the "
            "least possible time of a training step, as a share of its measured time. The least "
            "time is the longer of two: 3x the forward FLOPs at the rate of a large matrix product "
            f"({matmul / 1000:,.2f} TFLOP/s), or writing and reading once the tensors saved for "
            "backward, the gradients, the weights and Adam's moments at the rate of a large copy "
            f"({copy:,.0f} GB/s). Both rates are measured in turn with the step. GFLOP: forward "
            "pass of one image, counted. saved/image: what autograd keeps for the backward pass. "
            "training: peak over three steps, on CUDA of allocated tensors, on a CPU the growth of "
            "the process. process: on CUDA the total GPU memory in use (mem_get_info), on a CPU "
            "the peak resident size. before: the same, before the model is created.") + "\n"
        + paragraph(
            "2080: as published in 2021 for one RTX 2080 (8 GB): s/epoch and MiB, batch 250, fp16, "
            "JPEG decoding included, memory as nvidia-smi shows it."),
        *failures(lines, "{row}, batch {batch_size}")]


def kernels_text(result: dict) -> str:
    """Everything that `python bench.py --kernels-table` measured; `result` as in kernels.json."""
    blocks, shapes, steps = (result[key] for key in ("blocks", "shapes", "steps"))
    copies = [row["copy_gb_s"] for row in blocks if "failed" not in row]
    copy = number(statistics.median_high(copies)) if copies else "-"
    text = [heading(result, f"batch as shown, copy {copy} GB/s"), section(
        "**The block**, with residual, in training: median [p20, p80], speed relative to eager, "
        "GB/s of the bytes that must be read and written, KiB per sample that autograd keeps.",
        table(block_lines(blocks), BLOCKS, left=2), *failures(blocks, "{shape}"))]
    if shapes:
        text.append(section(
            "**The block in many shapes**: fused, relative to eager. The lowest speed, where it "
            "is, and the median.", table(shape_lines(shapes), SHAPES),
            *failures(shapes, "{shape}")))
    text.append(section(
        "**A training step**, forward, backward, Adam: median [p20, p80], speed relative to "
        "eager, peak memory.", table(steps, STEPS, left=2),
        *failures(steps, "{model}, {way}, batch {batch_size}")))
    return "\n\n".join(text) + "\n"


def block_lines(blocks: list[dict]) -> list[dict]:
    """A line per shape and candidate, forward beside forward + backward."""
    lines = {}
    for row in blocks:
        shape, way = shape_text(row["shape"]), row.get("way", "")
        first = "" if any(shape == other for other, _ in lines) else shape
        line = lines.setdefault((shape, way), {"first": first, "way": way})
        if "failed" in row:
            line["failed"] = row["failed"]
            continue
        mode = row["mode"].split()[-1]
        line |= {mode: filled(MS, row), f"{mode}_faster": row["faster_than_eager"],
                 f"{mode}_gb_s": f"{row['gb_s']:.{1 if row['gb_s'] < 100 else 0}f}",
                 "kib": row["saved_bytes_per_sample"] / 1024}
    return list(lines.values())


def shape_lines(shapes: list[dict]) -> list[dict]:
    """A line per kernel size and dtype: the lowest speed, where it is, and the median."""
    groups = {}  # {(K, dtype): {mode: rows}}
    for row in shapes:
        if "failed" not in row:
            modes = groups.setdefault((row["shape"][3], row["dtype"]), {})
            modes.setdefault(row["mode"], []).append(row)
    lines = []
    for (K, dtype), modes in groups.items():
        line = {"K": K, "dtype": dtype}
        for mode, rows in modes.items():
            rows.sort(key=lambda row: row["faster"])
            line |= {f"{mode}_lowest": f"{rows[0]['faster']:.2f}x",
                     f"{mode}_shape": rows[0]["shape"],
                     f"{mode}_median": f"{rows[len(rows) // 2]['faster']:.2f}x"}
        lines.append(line)
    return lines
