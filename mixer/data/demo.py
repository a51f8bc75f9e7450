"""Drawn cats and dogs, for a machine without data.

The two classes differ only in shape: `scene` draws everything else without knowing the class.
In an animal's coordinates the head has a radius of about 1 around (0, 0), and y points down.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .images import ImageSet, digest

CLASSES = ["cat", "dog"]
GRAIN = 96  # cells per side of the noise, so that an image is the same picture at every size
LIGHT, DARK = (244, 240, 230), (30, 26, 28)
TURNS = np.linspace(0, 2 * np.pi, 24, endpoint=False)


def oval(x, y, rx, ry):
    return np.stack([x + rx * np.cos(TURNS), y + ry * np.sin(TURNS)], axis=1)


def smooth(points, rounds=3):
    """Closed polygon (N, 2) -> (N * 2**rounds, 2) with its corners cut, Chaikin 1974."""
    p = np.asarray(points, dtype=float)
    for _ in range(rounds):
        q = np.roll(p, -1, axis=0)
        p = np.stack([0.75 * p + 0.25 * q, 0.25 * p + 0.75 * q], axis=1).reshape(-1, 2)
    return p


CAT_HEAD = smooth([(-0.7, -0.85), (0.7, -0.85), (1.2, 0), (0.95, 0.8),
                   (0, 1), (-0.95, 0.8), (-1.2, 0)])
CAT_EAR = np.array([(1.05, 0.0), (1.0, -1.7), (0.05, -0.75)])
DOG_HEAD = smooth([(-0.65, -1), (0.65, -1), (0.95, -0.3), (0.7, 0.6), (0.55, 1.3),
                   (-0.55, 1.3), (-0.7, 0.6), (-0.95, -0.3)])
DOG_EAR = smooth([(0.4, -0.95), (0.8, -1.05), (1.3, -0.3), (1.5, 0.75), (1.05, 0.9), (0.75, 0)])


def pen(canvas, matrix=((1, 0), (0, 1)), origin=(0, 0)):
    """The function that fills polygons (N, 2): points @ matrix.T + origin is in the unit square."""
    draw, n = ImageDraw.Draw(canvas), canvas.width

    def fill(points, colour, outline=None):
        xy = ((points @ np.transpose(matrix) + origin) * n).ravel().tolist()
        draw.polygon(xy, fill=colour)
        if outline:
            draw.line(xy + xy[:4], fill=outline, width=max(1, round(0.01 * n)))
    return fill


def tint(rng, low, high):
    """An RGB colour with a mean between low and high, of 255."""
    warmth, green = rng.uniform(-0.35, 0.35), rng.uniform(-0.2, 0.2)
    balance = np.array([1 + warmth - green / 2, 1 + green, 1 - warmth - green / 2])
    return tuple((rng.uniform(low, high) * balance).clip(0, 255).astype(int).tolist())


def blend(a, b, fraction):
    return tuple(round(p + (q - p) * fraction) for p, q in zip(a, b, strict=True))


def background(rng, n, low, high):
    """An n x n image: a gradient, and shapes that could be ears or heads."""
    corners = np.array([tint(rng, low, high) for _ in range(4)], dtype=np.uint8).reshape(2, 2, 3)
    canvas = Image.fromarray(corners).resize((n, n), Image.Resampling.BILINEAR)
    for _ in range(rng.integers(0, 8)):
        corners = rng.uniform(0, 1, 2) + rng.uniform(-0.15, 0.15, (rng.integers(3, 6), 2))
        pen(canvas)(corners if rng.random() < 0.5 else smooth(corners), tint(rng, low, high))
    return canvas


def scene(rng):
    """Everything in a picture except the species."""
    light = rng.random() < 0.66  # the animal is lighter than its background, or else darker
    level = rng.uniform(50, 100) if light else rng.uniform(155, 205)
    fur = tint(rng, *((150, 235) if light else (30, 100)))
    second = blend(fur, DARK if light else LIGHT, rng.uniform(0.3, 0.8))
    angle, scale = np.deg2rad(rng.uniform(-14, 14)), rng.uniform(0.22, 0.3)
    return SimpleNamespace(
        matrix=[[scale * np.cos(angle), -scale * np.sin(angle)],
                [scale * np.sin(angle), scale * np.cos(angle)]],
        origin=rng.uniform([0.41, 0.41], [0.59, 0.59]), turn=rng.uniform(-0.15, 0.15),
        backdrop=(level - 30, level + 30), fur=fur, ear=second if rng.random() < 0.5 else fur,
        line=blend(fur, DARK if rng.random() < 0.7 else LIGHT, 0.75), iris=tint(rng, 120, 220),
        muzzle=blend(fur, LIGHT, rng.uniform(0, 0.9)), long=rng.uniform(0.85, 1.15),
        blur=rng.uniform(0, 0.008), gain=rng.uniform(0.7, 1.1), shift=rng.uniform(-25, 25),
        grain=rng.normal(0, rng.uniform(2, 8), (GRAIN, GRAIN)).astype(np.float32))


def cat(fill, a):
    """Round head, pointed ears, slit pupils, a small nose."""
    for s in (-1, 1):
        fill(CAT_EAR * (s, a.long), a.ear, a.line)
    fill(CAT_HEAD, a.fur, a.line)
    for s in (-1, 1):
        fill(oval(0.45 * s + a.turn, -0.1, 0.28, 0.24), a.iris, a.line)
        fill(oval(0.45 * s + a.turn, -0.1, 0.07, 0.22), DARK)
        fill(oval(0.18 * s + a.turn, 0.5, 0.24, 0.19), a.muzzle)
    fill(oval(a.turn, 0.37, 0.15, 0.1), DARK)


def dog(fill, a):
    """Long head and muzzle, hanging ears, round pupils, a big nose."""
    fill(DOG_HEAD, a.fur, a.line)
    fill(oval(a.turn, 0.8, 0.5, 0.55), a.muzzle)
    for s in (-1, 1):
        fill(DOG_EAR * (s, a.long), a.ear, a.line)
        fill(oval(0.36 * s + a.turn, -0.25, 0.2, 0.2), a.iris, a.line)
        fill(oval(0.36 * s + a.turn, -0.25, 0.12, 0.12), DARK)
    fill(oval(a.turn, 0.5, 0.3, 0.21), DARK)


def draw(index: int, size: int, seed: int = 0) -> np.ndarray:
    """Image `index`, of class CLASSES[index % 2]: uint8 (size, size, 3), RGB.

    A function of (seed, index): the same picture at every size and in any order.
    """
    rng = np.random.default_rng([seed, index])
    a = scene(rng)
    canvas = background(rng, 2 * size, *a.backdrop)
    (cat, dog)[index % 2](pen(canvas, a.matrix, a.origin), a)
    blurred = canvas.reduce(2).filter(ImageFilter.BoxBlur(a.blur * size))
    grain = np.asarray(Image.fromarray(a.grain).resize((size, size), Image.Resampling.BILINEAR))
    x = np.asarray(blurred, dtype=np.float32)
    x = (x - 128) * a.gain + (128 + a.shift) + grain[:, :, None]
    return x.clip(0, 255).astype(np.uint8)


def drawn_images(count: int = 4400) -> ImageSet:
    """`count` drawn pictures, half cats and half dogs. The file of a picture holds its number."""
    names, path = [f"{CLASSES[index % 2]}.{index}" for index in range(count)], Path(__file__)
    return ImageSet(path, "drawn pictures", CLASSES, files=names, names=names,
                    labels=[index % 2 for index in range(count)], splits=[""] * count,
                    sizes=[0] * count, cache_key=digest([path.read_bytes(), count]),
                    read_file=lambda name: name.split(".")[1].encode(),
                    decode=lambda data, size: draw(int(data), size))
