"""Drawn cats and dogs, for a machine without data.

The two classes differ only in shape: `scene` draws everything else without knowing the class.
In an animal's coordinates the head has a radius of about 1 around (0, 0), and y points down.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .images import ImageSet

CLASSES = ["cat", "dog"]
GRAIN = 96  # cells per side of the noise, so that an image is the same picture at every size
LIGHT, DARK, PINK = (244, 240, 230), (30, 26, 28), (226, 128, 132)
IRISES = [LIGHT, (214, 196, 84), (140, 196, 110), (130, 184, 220)]


def smooth(points, rounds=3):
    """Closed polygon (N, 2) -> (N * 2**rounds, 2) with its corners cut, Chaikin 1974."""
    p = np.asarray(points, dtype=float)
    for _ in range(rounds):
        q = np.roll(p, -1, axis=0)
        p = np.stack([0.75 * p + 0.25 * q, 0.25 * p + 0.75 * q], axis=1).reshape(-1, 2)
    return p


TURNS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
CIRCLE = np.stack([np.cos(TURNS), np.sin(TURNS)], axis=1)
TRUNK = smooth([(-0.5, 0.4), (0.5, 0.4), (0.8, 1.6), (1.2, 2.9), (-1.2, 2.9), (-0.8, 1.6)])
CAT_HEAD = smooth([(-0.7, -0.85), (0.7, -0.85), (1.2, 0), (0.95, 0.8),
                   (0, 1), (-0.95, 0.8), (-1.2, 0)])
CAT_EAR = np.array([(1.05, 0.0), (1.0, -1.7), (0.05, -0.75)])
CAT_TAIL = smooth([(0.9, 2.6), (2, 2.6), (2.2, 1.8), (1.6, 1.3), (1.8, 0.7),
                   (1.9, 1.3), (2.3, 1.8), (2.1, 2.8), (0.9, 2.9)])
DOG_HEAD = smooth([(-0.65, -1), (0.65, -1), (0.95, -0.3), (0.7, 0.6), (0.55, 1.3),
                   (-0.55, 1.3), (-0.7, 0.6), (-0.95, -0.3)])
DOG_SNOUT = smooth([(-0.35, 0.1), (0.35, 0.1), (0.65, 0.9), (0, 1.4), (-0.65, 0.9)])
DOG_EAR = smooth([(0.4, -0.95), (0.8, -1.05), (1.3, -0.3), (1.5, 0.75), (1.05, 0.9), (0.75, 0)])
DOG_TAIL = smooth([(0.5, 2.5), (1.3, 2.2), (1.9, 1.3), (2.1, 1.5), (1.7, 2.6), (0.7, 2.9)])


def oval(x, y, rx, ry):
    return CIRCLE * (rx, ry) + (x, y)


class Pen:
    """Draws points (N, 2) on a canvas; points @ matrix.T + origin is in the unit square."""

    def __init__(self, canvas, matrix=((1, 0), (0, 1)), origin=(0, 0)):
        self.canvas, self.draw, self.n = canvas, ImageDraw.Draw(canvas), canvas.width
        self.matrix, self.origin = np.asarray(matrix).T * self.n, np.asarray(origin) * self.n

    def place(self, points):
        return (points @ self.matrix + self.origin).ravel().tolist()

    def fill(self, points, colour, outline=None):
        xy = self.place(points)
        self.draw.polygon(xy, fill=colour)
        if outline:
            self.draw.line(xy + xy[:4], fill=outline, width=max(1, round(0.01 * self.n)))

    def line(self, points, colour, width):
        """`width` as a fraction of the picture's side."""
        xy = self.place(np.array(points))
        self.draw.line(xy, fill=colour, width=max(1, round(width * self.n)))

    def marks(self, shapes, within, colour):
        """Fill those parts of `shapes` that lie inside the polygon `within`."""
        spots, inside = (Image.new("1", self.canvas.size) for _ in range(2))
        for shape in shapes:
            ImageDraw.Draw(spots).polygon(self.place(shape), fill=1)
        ImageDraw.Draw(inside).polygon(self.place(within), fill=1)
        self.canvas.paste(colour, mask=ImageChops.logical_and(spots, inside))


def tint(rng, low, high, warm=(-0.35, 0.35)):
    """An RGB colour with a mean between low and high, of 255."""
    warmth, green = rng.uniform(*warm), rng.uniform(-0.2, 0.2)
    balance = np.array([1 + warmth - green / 2, 1 + green, 1 - warmth - green / 2])
    return tuple((rng.uniform(low, high) * balance).clip(0, 255).astype(int).tolist())


def blend(a, b, fraction):
    return tuple(round(p + (q - p) * fraction) for p, q in zip(a, b, strict=True))


def background(rng, n, low, high):
    """An n x n image: a gradient, stripes or blobs, and shapes that could be ears or heads."""
    corners = np.array([tint(rng, low, high) for _ in range(4)], dtype=np.uint8).reshape(2, 2, 3)
    canvas = Image.fromarray(corners).resize((n, n), Image.Resampling.BILINEAR)
    pen, kind = Pen(canvas), rng.choice(["plain", "stripes", "blobs"])
    if kind == "stripes":
        angle, count, colour = rng.uniform(0, np.pi), rng.integers(3, 9), tint(rng, low, high)
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-np.sin(angle), np.cos(angle)])
        for k in range(count):
            middle = 0.5 + across * 1.4 * ((k + 0.5) / count - 0.5)
            pen.line([middle - along, middle + along], colour, 0.6 / count)
    elif kind == "blobs":
        for x, y, r in rng.uniform([0, 0, 0.1], [1, 1, 0.3], (rng.integers(2, 6), 3)):
            pen.fill(oval(x, y, r, r), tint(rng, low, high))
    for _ in range(rng.integers(0, 6)):
        corners = rng.uniform(0, 1, 2) + rng.uniform(-0.13, 0.13, (3, 2))
        pen.fill(corners if rng.random() < 0.5 else smooth(corners), tint(rng, low, high))
    return canvas


def markings(rng):
    """Polygons around the head: none, tabby stripes, patches, one half, or a blaze."""
    kind = rng.integers(5)
    if kind == 1:
        return ([oval(0.3 * k, -0.8, 0.08, 0.4) for k in (-1, 0, 1)]
                + [oval(s, 0.1 + 0.3 * k, 0.45, 0.07) for s in (-1, 1) for k in (0, 1)])
    if kind == 2:
        return [oval(*p) for p in rng.uniform([-1, -1, 0.2, 0.2], [1, 1, 0.6, 0.6], (3, 4))]
    if kind == 3:
        return [np.array([(0, -2), (2, -2), (2, 2), (0, 2)])]
    return [oval(0, -0.2, 0.25, 1.2)] if kind == 4 else []


def scene(rng):
    """Everything in a picture except the species."""
    light = rng.random() < 0.66  # the animal is lighter than its background, or else darker
    level = rng.uniform(50, 100) if light else rng.uniform(155, 205)
    fur = tint(rng, *((150, 235) if light else (30, 100)), warm=(-0.1, 0.45))
    muzzle = blend(fur, LIGHT, rng.uniform(0, 0.9))
    sitting, mirror = rng.random() < 0.3, rng.choice([-1, 1])
    angle, stretch = np.deg2rad(rng.uniform(-14, 14)), rng.uniform(0.92, 1.08)
    scale = rng.uniform(0.22, 0.25) if sitting else rng.uniform(0.25, 0.3)
    turned = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return SimpleNamespace(
        scale=scale, matrix=turned @ np.diag([mirror * stretch, 1 / stretch]), sitting=sitting,
        origin=np.array([0.5, 0.42 if sitting else 0.52]) + rng.uniform(-0.04, 0.04, 2),
        turn=rng.uniform(-0.15, 0.15), backdrop=(level - 30, level + 30),
        fur=fur, line=blend(fur, DARK if rng.random() < 0.7 else LIGHT, 0.75), muzzle=muzzle,
        second=blend(fur, DARK if light else LIGHT, rng.uniform(0.3, 0.8)),
        two_tone=rng.random() < 0.5, pink=blend(PINK, fur, rng.uniform(0, 0.4)),
        nose=PINK if sum(muzzle) < 300 else DARK,
        whisker=DARK if light else LIGHT, iris=IRISES[rng.integers(4)], markings=markings(rng),
        tongue=rng.random() < 0.4, long=rng.uniform(0.85, 1.15), droop=rng.uniform(-0.15, 0.15),
        blur=rng.uniform(0, 0.008), gain=rng.uniform(0.7, 1.1), shift=rng.uniform(-25, 25),
        grain=rng.normal(0, rng.uniform(2, 8), (GRAIN, GRAIN)).astype(np.float32))


def body(pen, a, tail):
    """Of a sitting animal, seen from the front."""
    if not a.sitting:
        return
    pen.fill(tail, a.fur, a.line)
    pen.fill(TRUNK, a.fur, a.line)
    pen.fill(oval(0, 1.5, 0.45, 0.7), a.muzzle)
    for s in (-1, 1):
        pen.fill(oval(0.35 * s, 2.35, 0.25, 0.65), a.fur, a.line)
        pen.fill(oval(0.38 * s, 2.9, 0.36, 0.2), a.muzzle, a.line)


def cat(pen, a):
    """Round head, pointed ears, slit pupils, a small triangular nose, whiskers, a thin tail."""
    body(pen, a, CAT_TAIL)
    for s in (-1, 1):
        ear = CAT_EAR * (s, a.long)
        pen.fill(ear, a.second if a.two_tone else a.fur, a.line)
        pen.fill(0.6 * ear + 0.4 * ear.mean(0), a.pink)
    pen.fill(CAT_HEAD, a.fur, a.line)
    pen.marks(a.markings, CAT_HEAD, a.second)
    for s in (-1, 1):
        eye = 0.45 * s + a.turn
        pen.fill(oval(eye, -0.1, 0.28, 0.24), a.iris, a.line)
        pen.fill(oval(eye, -0.1, 0.07, 0.22), DARK)
        pen.fill(oval(0.18 * s + a.turn, 0.5, 0.24, 0.19), a.muzzle)
        for k in (-1, 0, 1):
            x, y = 0.35 * s + a.turn, 0.5 + 0.07 * k
            pen.line([(x, y), (x + 1.1 * s, y + 0.22 * k + a.droop)], a.whisker, 0.025 * a.scale)
    if a.tongue:
        pen.fill(oval(a.turn, 0.75, 0.13, 0.18), a.pink)
    pen.fill(np.array([(-0.17, 0.28), (0.17, 0.28), (0, 0.46)]) + (a.turn, 0), a.nose)


def dog(pen, a):
    """Longer head and snout, hanging ears, round pupils, a big oval nose, a short thick tail."""
    body(pen, a, DOG_TAIL)
    pen.fill(DOG_HEAD, a.fur, a.line)
    pen.marks(a.markings, DOG_HEAD, a.second)
    if a.tongue:
        pen.fill(oval(a.turn, 1.3, 0.22, 0.4), a.pink, a.line)
    pen.fill(DOG_SNOUT + (a.turn, 0), a.muzzle)
    for s in (-1, 1):
        pen.fill(DOG_EAR * (s, a.long), a.second if a.two_tone else a.fur, a.line)
        eye = 0.36 * s + a.turn
        pen.fill(oval(eye, -0.25, 0.2, 0.2), a.iris, a.line)
        pen.fill(oval(eye, -0.25, 0.12, 0.12), DARK)
    pen.line([(a.turn, 0.6), (a.turn, 1.0)], a.line, 0.03 * a.scale)
    pen.line([(a.turn - 0.35, 0.95), (a.turn, 1.05), (a.turn + 0.35, 0.95)], a.line, 0.03 * a.scale)
    pen.fill(oval(a.turn, 0.5, 0.3, 0.21), a.nose)


def render(index: int, size: int) -> np.ndarray:
    """Image `index`, of class CLASSES[index % 2]: uint8 (size, size, 3), RGB.

    A function of the index: the same picture at every size and in any order.
    """
    rng = np.random.default_rng([0, index])
    a = scene(rng)
    canvas = background(rng, 2 * size, *a.backdrop)
    (cat, dog)[index % 2](Pen(canvas, a.matrix, a.origin), a)
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
                    stamps=[(0, path.stat().st_mtime_ns)] * count,
                    read_file=lambda name: name.split(".")[1].encode(),
                    decode=lambda data, size: render(int(data), size))
