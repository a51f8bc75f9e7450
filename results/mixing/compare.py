"""What do only the neighbours of a patch tell? A ConvMixer beside one with 1x1 kernels.

python results/mixing/compare.py MIXING PATCHES IMAGES

MIXING and PATCHES are folders of `python -m mixer.predict RUN --evaluate --split val` of two runs
with the same seed, so with the same validation images; IMAGES is where these are. Writes counts.md,
and mixing.png: the images that only the first model gets right, those first that the second one is
most sure of, then the reverse.
"""
import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from mixer.data.images import find_images
from mixer.report.pictures import draw_grid
from mixer.report.tables import table

HERE, SHOWN, COLUMNS = Path(__file__).parent, 6, 6


def answers(folder):
    """{file: (right?, probability of its answer)}"""
    with open(Path(folder) / "predictions.csv", newline="") as f:
        return {row["file"]: (row["class"] == row["truth"], float(row[f"p_{row['class']}"]))
                for row in csv.DictReader(f)}


def main(mixing, patches, place):
    mixing, patches, images = answers(mixing), answers(patches), find_images(place)
    assert mixing.keys() == patches.keys(), "these runs have other validation images"

    # the counts
    groups = {(a, b): [file for file in mixing if (mixing[file][0], patches[file][0]) == (a, b)]
              for a in (True, False) for b in (True, False)}
    n = len(mixing)
    rows = [{"right": words, "n": len(groups[key]), "share": len(groups[key]) / n}
            for words, key in (("both", (True, True)), ("9x9 kernels alone", (True, False)),
                               ("1x1 kernels alone", (False, True)), ("neither", (False, False)))]
    text = table(rows, [("right", "{right}"), ("images", "{n:,}"), ("share", "{share:.3f}")])
    (HERE / "counts.md").write_text(f"{text}\n\n{n:,} validation images.\n")

    # the pictures
    def captioned(file, answers):
        index = images.files.index(file)
        image = torch.from_numpy(images.decode(images.read(index), 192).copy())
        return image, f"{file.rpartition('/')[2]}\nthe other: wrong, {answers[file][1]:.2f}"
    tiles = []
    for key, other in (((True, False), patches), ((False, True), mixing)):
        chosen = sorted(groups[key], key=lambda file: -other[file][1])[:SHOWN]
        tiles += [[captioned(file, other) for file in chosen[start:start + COLUMNS]]
                  for start in range(0, len(chosen), COLUMNS)]
    draw_grid(HERE / "mixing.png", "right with 9x9 kernels alone (above), with 1x1 kernels alone "
              "(below), those first that the other model is most sure of", tiles)
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
