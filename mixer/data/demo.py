"""Synthetic cats and dogs, for a machine without data.

The two classes differ only in shape: `scene` draws everything else without knowing the class.
In an animal's coordinates the head has a radius of about 1 around (0, 0), and y points down.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .images import ImageSet

CLASSES, COUNT = ["cat", "dog"], 4400
LIGHT, DARK, PINK = (244, 240, 230), (30, 26, 28), (226, 128, 132)
IRISES = [LIGHT, (214, 196, 84), (140, 196, 110), (130, 184, 220)]


def smooth(points):
    """Closed polygon (N, 2) -> (8 * N, 2) with its corners cut three times, Chaikin 1974."""
    p = np.asarray(points, dtype=float)
    for _ in range(3):
        q = np.roll(p, -1, axis=0)
        p = np.stack([0.75 * p + 0.25 * q, 0.25 * p + 0.75 * q], axis=1).reshape(-1, 2)
    return p


TURNS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack([np.cos(TURNS), np.sin(TURNS)], axis=1)
CAT_HEAD = smooth([(-0.7, -0.85), (0.7, -0.85), (1.2, 0), (0.95, 0.8),
                   (0, 1), (-0.95, 0.8), (-1.2, 0)])
CAT_EAR = np.array([(1.05, 0.0), (1.0, -1.7), (0.05, -0.75)])
CAT_NOSE = np.array([(-0.17, 0.28), (0.17, 0.28), (0, 0.46)])
DOG_HEAD = smooth([(-0.65, -1), (0.65, -1), (0.95, -0.3), (0.7, 0.6), (0.55, 1.3),
                   (-0.55, 1.3), (-0.7, 0.6), (-0.95, -0.3)])
DOG_SNOUT = smooth([(-0.35, 0.1), (0.35, 0.1), (0.65, 0.9), (0, 1.4), (-0.65, 0.9)])
DOG_MOUTH = np.array([(0, 0.6), (0, 1.0), (-0.35, 0.95), (0, 1.05), (0.35, 0.95)])
DOG_EAR = smooth([(0.4, -0.95), (0.8, -1.05), (1.3, -0.3), (1.5, 0.75), (1.05, 0.9), (0.75, 0)])


def oval(x, y, rx, ry):
    return CIRCLE * (rx, ry) + (x, y)


class Pen:
    """Draws points (N, 2) on a canvas; points @ matrix.T + origin is in the unit square."""

    def __init__(self, canvas, matrix=((1, 0), (0, 1)), origin=(0, 0)):
        self.draw, self.n = ImageDraw.Draw(canvas), canvas.width
        self.matrix, self.origin = np.asarray(matrix).T * self.n, np.asarray(origin) * self.n

    def fill(self, points, colour, outline=None):
        xy = self.place(points)
        self.draw.polygon(xy, fill=colour)
        if outline:
            self.draw.line(xy + xy[:4], fill=outline, width=max(1, round(0.01 * self.n)))

    def line(self, points, colour):
        self.draw.line(self.place(points), fill=colour, width=max(1, round(0.006 * self.n)))

    def place(self, points):
        return (points @ self.matrix + self.origin).ravel().tolist()


def tint(rng, low, high, warm=(-0.35, 0.35)):
    """An RGB colour with a mean between low and high, of 255."""
    warmth, green = rng.uniform(*warm), rng.uniform(-0.2, 0.2)
    balance = np.array([1 + warmth - green / 2, 1 + green, 1 - warmth - green / 2])
    return tuple((rng.uniform(low, high) * balance).clip(0, 255).astype(int).tolist())


def blend(a, b, fraction):
    return tuple(round(p + (q - p) * fraction) for p, q in zip(a, b, strict=True))


def background(rng, n, low, high):
    """An n x n image: a gradient, maybe blobs, and shapes that could be ears."""
    corners = np.array([tint(rng, low, high) for _ in range(4)], dtype=np.uint8).reshape(2, 2, 3)
    canvas = Image.fromarray(corners).resize((n, n), Image.Resampling.BILINEAR)
    pen = Pen(canvas)
    for x, y, r in rng.uniform([0, 0, 0.1], [1, 1, 0.3], (rng.integers(0, 5), 3)):
        pen.fill(oval(x, y, r, r), tint(rng, low, high))
    for _ in range(rng.integers(0, 6)):
        corners = rng.uniform(0, 1, 2) + rng.uniform(-0.13, 0.13, (3, 2))
        pen.fill(corners if rng.random() < 0.5 else smooth(corners), tint(rng, low, high))
    return canvas


def scene(rng):
    """Everything in a picture except the species."""
    # colours of fur and background
    light = rng.random() < 0.66  # the animal is lighter than its background, or else darker
    level = rng.uniform(50, 100) if light else rng.uniform(155, 205)
    fur = tint(rng, *((150, 235) if light else (30, 100)), warm=(-0.1, 0.45))
    second = blend(fur, DARK if light else LIGHT, rng.uniform(0.3, 0.8))
    # how the head is turned and stretched
    angle, stretch = np.deg2rad(rng.uniform(-14, 14)), rng.uniform(0.92, 1.08)
    turned = rng.uniform(0.22, 0.3) * np.array([[np.cos(angle), -np.sin(angle)],
                                                [np.sin(angle), np.cos(angle)]])
    return SimpleNamespace(
        matrix=turned @ np.diag([stretch, 1 / stretch]),
        origin=rng.uniform((0.46, 0.44), (0.54, 0.56)), turn=(rng.uniform(-0.15, 0.15), 0),
        backdrop=(level - 30, level + 30), fur=fur, ear=second if rng.random() < 0.5 else fur,
        line=blend(fur, DARK if rng.random() < 0.7 else LIGHT, 0.75),
        muzzle=blend(fur, LIGHT, rng.uniform(0, 0.9)), pink=blend(PINK, fur, rng.uniform(0, 0.4)),
        nose=DARK if light else PINK, iris=IRISES[rng.integers(4)], long=rng.uniform(0.85, 1.15),
        blur=rng.uniform(0, 0.008), gain=rng.uniform(0.7, 1.1), shift=rng.uniform(-25, 25),
        grain=rng.uniform(2, 8))


def cat(pen, a):
    """Round head, pointed ears, slit pupils, a small triangular nose, whiskers."""
    for s in (-1, 1):
        ear = CAT_EAR * (s, a.long)
        pen.fill(ear, a.ear, a.line)
        pen.fill(0.6 * ear + 0.4 * ear.mean(0), a.pink)
    pen.fill(CAT_HEAD, a.fur, a.line)
    for s in (-1, 1):
        pen.fill(oval(0.45 * s, -0.1, 0.28, 0.24) + a.turn, a.iris, a.line)
        pen.fill(oval(0.45 * s, -0.1, 0.07, 0.22) + a.turn, DARK)
        pen.fill(oval(0.18 * s, 0.5, 0.24, 0.19) + a.turn, a.muzzle)
        for y in (0.43, 0.5, 0.57):
            pen.line(np.array([(0.35 * s, y), (1.45 * s, 4 * y - 1.5)]) + a.turn, a.line)
    pen.fill(CAT_NOSE + a.turn, a.nose)


def dog(pen, a):
    """Longer head and snout, hanging ears, round pupils, a big oval nose."""
    pen.fill(DOG_HEAD, a.fur, a.line)
    pen.fill(DOG_SNOUT + a.turn, a.muzzle)
    for s in (-1, 1):
        pen.fill(DOG_EAR * (s, a.long), a.ear, a.line)
        pen.fill(oval(0.36 * s, -0.25, 0.2, 0.2) + a.turn, a.iris, a.line)
        pen.fill(oval(0.36 * s, -0.25, 0.12, 0.12) + a.turn, DARK)
    pen.line(DOG_MOUTH + a.turn, a.line)
    pen.fill(oval(0, 0.5, 0.3, 0.21) + a.turn, a.nose)


def render(index: int, size: int) -> np.ndarray:
    """Image `index`, of class CLASSES[index % 2]: uint8 (size, size, 3), RGB.

    A function of the index: at every size the same picture, with other grain.
    """
    rng = np.random.default_rng([0, index])
    a = scene(rng)
    canvas = background(rng, 2 * size, *a.backdrop)
    (cat, dog)[index % 2](Pen(canvas, a.matrix, a.origin), a)
    blurred = canvas.reduce(2).filter(ImageFilter.BoxBlur(a.blur * size))
    x = (np.asarray(blurred, np.float32) - 128) * a.gain + (128 + a.shift)
    x += rng.normal(0, a.grain, (size, size, 1))
    return x.clip(0, 255).astype(np.uint8)


def drawn_images() -> ImageSet:
    """4,400 synthetic images, half cats and half dogs. The file of a picture holds its number."""
    names, path = [f"{CLASSES[index % 2]}.{index}" for index in range(COUNT)], Path(__file__)
    return ImageSet(path, "synthetic images", CLASSES, files=names, names=names,
                    labels=[index % 2 for index in range(COUNT)], splits=[""] * COUNT,
                    stamps=[(0, path.stat().st_mtime_ns)] * COUNT,
                    read_file=lambda name: name.split(".")[1].encode(),
                    decode=lambda data, size: render(int(data), size))
