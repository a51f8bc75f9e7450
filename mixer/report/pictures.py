"""What a model answers and what it has learned -> pictures for people."""
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runtime.errors import printable
from .figures import drawing, new_figure, save_figure

COLUMNS = 8       # of tiles
FILTERS = 64      # of the first layer; more are shown by their principal components
KERNELS = 12      # of a depthwise layer, side by side
LAYERS = 8        # of them, from the first to the last
BLOCKS = 4        # of attention, from the first to the last
NAME_LENGTH = 24  # characters of a file name below a tile


class Answer(NamedTuple):
    """A model's answer for one labelled image: uint8 pixels (S, S, 3), names, a probability."""

    pixels: np.ndarray
    file: str
    truth: str
    answer: str
    probability: float  # of the answer


@drawing
def draw_mistakes(path: Path, title: str, groups: dict[str, Sequence[Answer]]) -> None:
    """Groups of answers under their headings, each image with its file, the truth, the answer."""
    groups = {heading: answers for heading, answers in groups.items() if answers}
    rows = sum(-(-len(answers) // COLUMNS) for answers in groups.values())
    figure, panels = new_figure(1.75 * COLUMNS, 2.25 * rows + 0.5, panels=COLUMNS, rows=rows)
    rest = iter(np.reshape(panels, (rows, COLUMNS)))
    for heading, answers in groups.items():
        for start in range(0, len(answers), COLUMNS):
            row = next(rest)
            for panel in row:
                panel.axis("off")
            for panel, a in zip(row, answers[start:start + COLUMNS], strict=False):
                panel.imshow(a.pixels)
                right = "right" if a.answer == a.truth else f"truth: {shortened(a.truth)}"
                panel.set_title(f"{shortened(a.file)}\n{shortened(a.answer)} {a.probability:.3f}\n"
                                f"{right}", fontsize=7.5, parse_math=False)
            if start == 0:
                row[0].annotate(heading, (0, 1), (0, 38), xycoords="axes fraction", fontsize=10,
                                textcoords="offset points", weight="bold").set_in_layout(False)
    figure.suptitle(f"{title}: file, answer with its probability, truth", parse_math=False)
    save_figure(figure, path)


def shortened(name: str) -> str:
    """The base name of a file, or a class, in NAME_LENGTH printable characters at most."""
    name = printable(name.rpartition("/")[2])
    half = NAME_LENGTH // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half - 1]}…{name[-half:]}"


@drawing
def draw_filters(path: Path, title: str, filters: np.ndarray, kernels: Sequence[np.ndarray],
                 similarities: np.ndarray | None) -> None:
    """filters (D, P, P, 3); beside them depthwise kernels (C, K, K) of each layer, or the
    similarities of positions (h, w, h, w), if there are any.
    """
    panels = 1 + bool(kernels or similarities is not None)
    figure, axes = new_figure(6.4 * panels, 6.9, panels=panels)
    first, second = axes if panels == 2 else (axes, None)
    for panel in figure.axes:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)

    D, P = filters.shape[:2]
    tiles, words = filters, f"the {D} filters of the first layer, {P}x{P} pixels:"
    if D > FILTERS:  # as Dosovitskiy et al. 2021, figure 7 (left)
        tiles = np.linalg.svd(filters.reshape(D, -1), full_matrices=False)[2]
        tiles = tiles.reshape(-1, *filters.shape[1:])[:FILTERS]
        words = f"the first {len(tiles)} principal components of {words[4:]}"
    first.imshow(_mosaic(0.5 + 0.5 * _scaled(tiles), COLUMNS))
    first.set_title(f"{words}\neach from its lowest to its highest value, grey is 0", fontsize=9)

    if similarities is not None:
        h, w = similarities.shape[:2]
        shown = second.imshow(_mosaic(similarities.reshape(h * w, h, w), w), cmap="viridis",
                              vmin=min(0, similarities.min()), vmax=1)
        second.set_title("cosine of each position with all positions:\none map a position, in its "
                         "place", fontsize=9)
        figure.colorbar(shown, ax=second, shrink=0.7)
    elif kernels:
        layers = evenly_spaced(len(kernels), LAYERS)
        rows = -(-LAYERS // len(layers))  # a layer
        count = min(rows * KERNELS, *map(len, kernels))
        mosaics = [_mosaic(_scaled(kernels[layer][:count]), KERNELS) for layer in layers]
        K, height = kernels[0].shape[1], len(mosaics[0])
        gap = np.full((2 * _gap(K), mosaics[0].shape[1]), np.nan)
        second.imshow(np.concatenate([part for mosaic in mosaics for part in (mosaic, gap)]),
                      cmap="RdBu_r", vmin=-1, vmax=1)
        second.set_yticks((height + len(gap)) * np.arange(len(layers)) + height // 2,
                          [f"layer {layer + 1}" for layer in layers], fontsize=8)
        second.set_title(f"the first {count} depthwise kernels of each layer, {K}x{K}:\n"
                         "each from blue (-1) to red (1), white is 0", fontsize=9)
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path)


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """At most so many of 0 .. count - 1, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(int))


def _scaled(tiles):
    """Tiles (n, ...), each divided by its largest absolute value."""
    return tiles / np.abs(tiles).max(tuple(range(1, tiles.ndim)), keepdims=True).clip(1e-12)


def _gap(side):
    return max(1, side // 8)


def _mosaic(tiles, columns):
    """Tiles (n, h, w[, 3]) in rows, with gaps of NaN (or white) between them."""
    n, h, w = tiles.shape[:3]
    gap, rows = _gap(h), -(-n // columns)
    colours = tiles.shape[3:]
    shape = (rows * (h + gap) - gap, columns * (w + gap) - gap, *colours)
    mosaic = np.full(shape, 1.0 if colours else np.nan)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (h + gap), i % columns * (w + gap)
        mosaic[y:y + h, x:x + w] = tile
    return mosaic


@drawing
def draw_attention(path: Path, title: str, images: np.ndarray, files: Sequence[str],
                   maps: np.ndarray) -> None:
    """uint8 images (n, S, S, 3) beside themselves, lit by the attention of each block, `maps`
    (depth, n, h, w): what is bright is attended to, the brightest patch as much as any."""
    blocks = evenly_spaced(len(maps), BLOCKS)
    n, S = images.shape[:2]
    figure, panels = new_figure(1.9 * (1 + len(blocks)), 2.0 * n + 0.5, panels=1 + len(blocks),
                                rows=n)
    for row, image, file, of_blocks in zip(np.reshape(panels, (n, -1)), images, files,
                                           maps.swapaxes(0, 1), strict=True):
        for panel in row:
            panel.axis("off")
        row[0].imshow(image)
        row[0].set_title(shortened(file), fontsize=8, parse_math=False)
        for panel, block in zip(row[1:], blocks, strict=True):
            light = of_blocks[block] / of_blocks[block].max()
            light = np.kron(light, np.ones([S // side for side in light.shape]))[..., None]
            panel.imshow((image * (0.1 + 0.9 * light)).astype(np.uint8))
            panel.set_title(f"block {block + 1}", fontsize=8)
    figure.suptitle(title, parse_math=False, fontsize=10)
    save_figure(figure, path)
