"""Labels from the places and the names of images. The structure decides: what might be a split, a
fold, a mask or a copy is never taken for a class, but refused.
"""
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from ..runtime.errors import InputError, listed
from .sources import Files, Parts

IN_NAMES = "class in the file name"
ROLES = ("train", "val", "test")
ROLE = re.compile(r"(?<![a-z])(?:(train|training|trainval)|(val|valid|validation|dev)|"
                  r"(tests?|testing|pred|prediction))(?:set|data)?(?![a-z])")
NO_CLASS = re.compile(  # folders that are parts of a data set
    r"(images?|imgs?|masks|labels|annotations|ground_?truth|gt|unlabell?ed)|"
    r"(k?fold|cv|part|subset|split|chunk|shard|batch)s?[\W_]*\d+", re.IGNORECASE)
SOURCES = set(  # words of names that say where a picture comes from, not what it shows
    "img image dsc dscf dscn dcim pxl mvi vid video clip p pic picture photo frame scan screenshot "
    "mask label labelled labeled unlabelled unlabeled fold part".split())
KAGGLE = re.compile(r"(cat|dog)\.\d+\.\w+", re.IGNORECASE)  # cat.0.jpg
OXFORD = re.compile(r"([^\W\d_]+(?:_[^\W\d_]+)*)_\d+\.\w+")  # Maine_Coon_1.jpg


def role(name: str) -> str | None:
    """What a folder's name says: "train", "val", "test", or None. As in TrainSet, seg_train."""
    match = ROLE.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return match and ROLES[match.lastindex - 1]


def find_labels(path: Path, paths: list[Parts], hint: str
                ) -> tuple[str, Parts, dict[Parts, tuple[str, Parts, str]]]:
    """How images are labelled, in words; the folders that contain everything; and for each path its
    split, the parts below, its class.

    split is "train", "val" or "test" where each folder says one of them, train once and val at most
    once. Without val it is "" for train, of which `batches.split` holds out some. Test images have
    no class. Raises InputError, which ends with `hint`, where the classes are not sure.
    """
    outer, below = os.path.commonprefix([parts[:-1] for parts in paths]), defaultdict(list)
    for parts in paths:
        below[parts[len(outer)]].append(parts)
    roles = {top: role(top) for top in below}
    counts = Counter(roles.values())
    loose = any(len(parts) == len(outer) + 1 for parts in paths)
    places = {parts: ("", parts[len(outer):]) for parts in paths}
    if not loose and not counts[None] and counts["train"] == 1 and counts["val"] <= 1:
        for top, of_top in below.items():
            depth = len(outer) + 1
            inner = os.path.commonprefix([parts[:-1] for parts in of_top])[depth:]
            if inner and role(inner[0]) == roles[top]:  # Kaggle's zips unpack to train/train/
                depth += 1
            split = roles[top] if counts["val"] or roles[top] == "test" else ""
            places |= {parts: (split, parts[depth:]) for parts in of_top}
    layout, class_of = _find_classes(
        path, {parts: rest for parts, (split, rest) in places.items() if split != "test"}, hint)
    return layout, outer, {parts: (split, rest, "" if split == "test" else class_of(rest))
                           for parts, (split, rest) in places.items()}


def _find_classes(path, places, hint):
    """How images are labelled, in words, and the function from the parts below the splits to the
    class. places: {path: parts below}."""
    rests = places.values()
    depths = {len(rest) for rest in rests}
    if depths == {1}:
        label = _label_in_name(path, [rest[0] for rest in rests], hint)
        return IN_NAMES, lambda rest: label(rest[0])
    middles = {rest[1] for rest in rests if len(rest) == 3}
    deeper = depths == {3} and len(middles) == 1 and re.fullmatch("(?i)images?|imgs?", *middles)
    names = sorted({rest[0] for rest in rests})
    animals = {(rest[0], match[1].lower()) for rest in rests
               if (match := KAGGLE.fullmatch(rest[-1]))}

    # what might be no class
    fault = None
    if depths != {2} and not deeper:
        ordered = sorted(places, key=lambda parts: (len(places[parts]), parts))
        fault = f"there are {'/'.join(ordered[0])} and {'/'.join(ordered[-1])}"
    elif all(map(role, names)) or any(map(NO_CLASS.fullmatch, names)):
        fault = f"{listed(names)} may be parts of the data set"
    elif len(animals) > len(dict(animals)):
        fault = f"{listed(sorted(dict(animals)))} hold cats and dogs, by the names of their files"
    if fault:
        raise InputError(f"--data: it is not sure which folders in {path} are classes: {fault}; "
                         "give a folder with a folder of images for each class, or one with such "
                         f"folders in train, val and test{hint}")
    return f"class folders{', one deeper: ' + min(middles) if deeper else ''}", lambda rest: rest[0]


def _label_in_name(path, files, hint):
    """The function from an image's base name to its class. All `files` must have one."""
    form = max((KAGGLE, OXFORD), key=lambda form: sum(map(bool, map(form.fullmatch, files))))
    unknown = [file for file in files if not form.fullmatch(file)]

    def label(file):
        name = form.fullmatch(file)[1]
        return name.lower() if form is KAGGLE else name
    if unknown:
        fault = f"the names of {len(unknown):,} of {len(files):,} images give no class"
    else:
        unknown = [name for name in sorted(set(map(label, files)))
                   if role(name) or SOURCES & set(name.lower().split("_"))]
        fault = "names say a split or a source, not a class"
    if unknown:
        raise InputError(f"--data: in {path}, {fault}: {listed(unknown, 3)}; name all as cat.0.jpg "
                         "or as Maine_Coon_1.jpg (words and one number), or make a folder for each "
                         f"class{hint}")
    return label


def listed_splits(files: Files, read: Callable[[str], bytes], outer: Parts) -> dict[str, str]:
    """Oxford-IIIT Pet's lists beside the folder of its images -> {stem: train or val}, or {}."""
    splits = {}
    for name, split in (("trainval.txt", "train"), ("test.txt", "val")):
        name = "/".join([*outer[:-1], "annotations", name])
        if name not in files:
            return {}
        for line in read(name).decode(errors="replace").splitlines():
            if line.strip() and not line.startswith("#"):
                splits[line.split()[0]] = split
    return splits


def checked_classes(path: Path, splits: list[str], labels: list[str]) -> list[str]:
    """The split and the class of each image -> the classes, sorted. Raises InputError if train and
    val have other classes, if one has two spellings, or if there is one alone."""
    train, val = ({name for split, name in zip(splits, labels, strict=True) if split == side}
                  for side in ("train", "val"))
    classes, spellings, fault = sorted(set(labels)), {}, None
    if train != val:
        fault = f"the classes of train and val in {path} differ: {listed(sorted(train ^ val))}"
    elif len(classes) < 2:
        fault = f"only one class found in {path}: {listed(classes)}; make a folder for each class"
    for name in classes:
        other = spellings.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other != name:
            fault = f"a class in {path} has two spellings, {other!a} and {name!a}: make them one"
    if fault:
        raise InputError(f"--data: {fault}")
    return classes
