"""What bench.py measured, as in its json files -> markdown. results/README.md explains it."""
import statistics
from operator import itemgetter

from ..experiments import BY_TITLE, RECIPE
from .tables import paragraph, spread, table

DTYPES = {"off": "float32", "fp16": "float16 autocast", "bf16": "bfloat16 autocast"}
TRAINING = spread("training_ms", "training_p20", "training_p80")
TIME = [("row", "{row}"), ("train, ms", TRAINING), ("images/s", "{training_images_per_s}"),
        ("s/epoch", "{seconds_per_25000_images}"),
        ("infer, ms", spread("inference_ms", "inference_p20", "inference_p80")),
        ("images/s", "{inference_images_per_s}"), ("2080 s", "{published_epoch_s}")]
MEMORY = [("row", "{row}"), ("parameters", "{parameters:,}"), ("GFLOP", "{gflop_per_image}"),
          ("batch", "{batch_size}"), ("saved/image", "{saved_mib_per_image}"),
          ("training", "{training_mib}"), ("process", "{process_mib}"),
          ("2080 MiB", "{published_mib:,}")]
PEERS = [("row", "{row}"), ("candidate", "{candidate}"), ("ms", TRAINING),
         ("ours / peer, time", "{faster:.2f}"), ("MiB", "{training_mib}"),
         ("ours / peer, memory", "{memory_ratio:.2f}")]
DATA = [("stage", "{stage}"), ("images/s", spread("images_per_s", "p20", "p80"))]
BLOCKS = [("N, C, map, K", "{shape}"), ("mode", "{mode}"), ("candidate", "{candidate}"),
          ("ms", spread("ms", "p20", "p80")), ("faster", "{faster:.2f}x"),
          ("saved KiB", lambda row: f"{row['saved_bytes_per_sample'] / 1024:.0f}")]
SHAPES = [("K", "{K}"), ("dtype", "{dtype}"), ("mode", "{mode}"), ("lowest", "{faster:.2f}x"),
          ("at N, C, map, K", "{shape}"), ("median", "{median:.2f}x")]
STEPS = [("model", "{row}, batch {batch_size}, {image_size} px"), ("candidate", "{candidate}"),
         ("ms", TRAINING), ("faster", "{faster:.2f}x"), ("MiB", "{training_mib}")]


def bench_text(result: dict) -> str:
    """Everything that `python bench.py` measured; `result` as in bench.json."""
    config, models = result["config"], result["models"]
    sizes = " and ".join(f"{side}x{side}" for side in config["image_size"])

    # of several sizes, those of a row one below the other; published was one size
    titles, lines = [row["row"] for row in models], []
    for row in sorted(models, key=lambda row: titles.index(row["row"])):
        original = BY_TITLE.get(row["row"]) if row["image_size"] == RECIPE["image_size"] else None
        size = f", {row['image_size']} px" if len(config["image_size"]) > 1 else ""
        lines.append({**(vars(original) if original else {}), **row, "row": row["row"] + size})
    sections = [("**Time.** Median [p20, p80] of a training step (forward, backward, Adam) and of "
                 "inference. s/epoch: seconds for 25,000 images. 2080: published for one RTX 2080.",
                 table(lines, TIME)),
                ("**Memory**, MiB, training. saved/image: what autograd keeps for the backward "
                 "pass. GFLOP: forward pass of one image.", table(lines, MEMORY))]
    if "peers" in result:
        sections.append(("**Peers.** Training steps. ours / peer below 1: ours takes less.",
                         table(result["peers"], PEERS, left=2)))
    if "data" in result:
        sections.append((f"**Data**, {config['data']}: the stages that feed a training step. "
                         "Decoding happens once.", table(result["data"], DATA)))
    return as_text(result, f"batch {config['batch_size']}, {sizes} pixels, --kernels "
                   f"{config['kernels']}{', compiled' if config['compile'] else ''}", sections)


def kernels_text(result: dict) -> str:
    """Everything that `python bench.py --kernels-table` measured; `result` as in kernels.json."""
    groups = {}  # {(K, dtype, mode): rows}
    for row in result["shapes"]:
        if "failed" not in row:
            K = row["shape"].split(", ")[-1]
            groups.setdefault((K, row["dtype"], row["mode"]), []).append(row)
    lowest = [{**min(rows, key=itemgetter("faster")), "K": K,
               "median": statistics.median_high(map(itemgetter("faster"), rows))}
              for (K, *_), rows in groups.items()]
    sections = [("**The block**, with residual: median [p20, p80], speed relative to eager, KiB "
                 "per sample that autograd keeps.", table(result["blocks"], BLOCKS, left=3))]
    if lowest:
        sections.append(("**The block in many shapes**: fused, relative to eager. The lowest "
                         "speed, where it is, and the median.", table(lowest, SHAPES, left=3)))
    sections.append(("**A training step**, forward, backward, Adam: median [p20, p80], speed "
                     "relative to eager, peak memory.", table(result["steps"], STEPS, left=2)))
    return as_text(result, "batch as shown", sections)


def as_text(result: dict, settings: str, sections: list[tuple[str, str]]) -> str:
    """What was measured on what; the tables under their captions; what failed, and why."""
    env, dtype = result["environment"], DTYPES[result["config"]["amp"]]
    versions = ", ".join(f"{name} {env[name]}" for name in ("python", "torch", "triton", "cuda")
                         if env[name])
    text = [paragraph(f"{env['device']}; {versions}; {dtype}, {settings}; {env['date']}.")]
    if env["cuda"] is None:
        text[0] += "\n" + ("Measured on a CPU, with sizes that suit a CPU: these numbers say "
                           "nothing about GPUs.")
    text += [f"{paragraph(caption)}\n\n{table}" for caption, table in sections]
    text += [paragraph("; ".join(f"{key} {value}" for key, value in row.items()))
             for rows in result.values() if isinstance(rows, list) for row in rows
             if "failed" in row]
    return "\n\n".join(text) + "\n"
