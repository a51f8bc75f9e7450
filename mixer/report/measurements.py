"""What bench.py measured, as in its json files -> markdown. results/README.md explains it."""
import statistics
from operator import itemgetter

from .tables import paragraph, spread, table

TRAINING = spread("training_ms", "training_p20", "training_p80")
TIME = [("row", "{row}"), ("train, ms", TRAINING), ("images/s", "{training_images_per_s}"),
        ("s/epoch", "{seconds_per_25000_images}"),
        ("infer, ms", spread("inference_ms", "inference_p20", "inference_p80")),
        ("images/s", "{inference_images_per_s}")]
MEMORY = [("row", "{row}"), ("parameters", "{parameters:,}"), ("GFLOP", "{gflop_per_image}"),
          ("batch", "{batch_size}"), ("saved/image", "{saved_mib_per_image}"),
          ("training", "{training_mib}"), ("process", "{process_mib}")]
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


# {list of the json file: [(caption, columns, how many of them are words)]}
TABLES = {
    "models": [("**Time** of training steps and of inference: median [p20, p80].", TIME, 1),
               ("**Memory** of training, MiB; GFLOP of a forward pass, per image.", MEMORY, 1)],
    "peers": [("**Peers**: training steps. ours / peer below 1: ours takes less.", PEERS, 2)],
    "data": [("**Data**: the stages that feed a training step.", DATA, 1)],
    "blocks": [("**The depthwise unit**, with residual; speed relative to eager.", BLOCKS, 3)],
    "shapes": [("**The unit in many shapes**: where fused is slowest beside eager.", SHAPES, 3)],
    "steps": [("**Training steps**; speed relative to eager, peak memory.", STEPS, 2)],
}


def measured_text(result: dict) -> str:
    """Everything that bench.py measured; `result` as in bench.json or kernels.json."""
    # the machine and the settings
    env, config = result["environment"], result["config"]
    if config["kernels_table"]:  # it has its own sizes
        config = {"amp": config["amp"], "repeats": config["repeats"]}
    versions = {name: env[name] for name in ("python", "torch", "triton", "cuda")}
    settings = (", ".join(f"{name} {value}" for name, value in values.items() if value)
                for values in (versions, config))
    text = [paragraph("; ".join([env["device"], *settings, env["date"]]))]
    if env["cuda"] is None:
        text.append("Measured on a CPU: these numbers say nothing about GPUs.")

    # the tables, and why rows failed
    lines = {name: rows for name, rows in result.items() if name in TABLES}
    failed = [row for rows in lines.values() for row in rows if "failed" in row]
    for name, prepare in (("models", model_lines), ("peers", model_lines), ("shapes", shape_lines)):
        if name in lines:
            lines[name] = prepare(lines[name])
    text += [f"{caption}\n\n{table(rows, columns, left)}"
             for name, rows in lines.items() if rows for caption, columns, left in TABLES[name]]
    text += [paragraph("; ".join(f"{key} {value}" for key, value in row.items()))
             for row in failed]
    return "\n\n".join(text) + "\n"


def model_lines(rows: list[dict]) -> list[dict]:
    """With several image sizes, put the lines of a row together and name the size in each."""
    titles = [row["row"] for row in rows]
    if len({row["image_size"] for row in rows}) == 1:
        return rows
    return [{**row, "row": f"{row['row']}, {row['image_size']} px"}
            for row in sorted(rows, key=lambda row: titles.index(row["row"]))]


def shape_lines(shapes: list[dict]) -> list[dict]:
    """For each kernel size, dtype and mode the shape of the lowest speed, and the median speed."""
    groups = {}
    for row in shapes:
        if "failed" not in row:
            K = row["shape"].split(", ")[-1]
            groups.setdefault((K, row["dtype"], row["mode"]), []).append(row)
    return [{**min(rows, key=itemgetter("faster")), "K": K,
             "median": statistics.median_high(map(itemgetter("faster"), rows))}
            for (K, *_), rows in groups.items()]
