"""Time and memory of a training image against the image size, a line per row.

python results/image-sizes/draw.py

Writes image_sizes.png from bench.json.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from mixer.report.figures import drawing, new_figure, save

HERE = Path(__file__).parent
PANELS = [("seconds_per_25000_images", "seconds per 25,000 training images"),
          ("saved_mib_per_image", "MiB saved for the backward pass, per image")]


@drawing
def draw(path, measured):
    figure, panels = new_figure(11, 4.5, len(PANELS))
    sizes = sorted({one["image_size"] for one in measured})
    for panel, (key, label) in zip(panels, PANELS, strict=True):
        for row in dict.fromkeys(one["row"] for one in measured):
            ones = [one for one in measured if one["row"] == row]
            panel.plot([one["image_size"] for one in ones], [one[key] for one in ones], "o-",
                       markersize=4, label=row)
        panel.set(xlabel="image side, pixels", ylabel=label, xscale="log", yscale="log")
        panel.set_xticks(sizes, map(str, sizes))
        panel.minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    draw(HERE / "image_sizes.png", json.loads((HERE / "bench.json").read_text())["models"])
