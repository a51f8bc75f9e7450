"""The split and the class of each image, from folders and names.

Labels are never guessed: what might be a split, a fold, a mask or a copy is refused.
"""
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from ..runtime.errors import InputError, listed
from .sources import Files, Parts

IN_NAMES = "class in the file name"
ROLE = re.compile(
    r"(?<![a-z])(?:(?P<train>train|training|trainval)|(?P<val>val|valid|validation|dev)|"
    r"(?P<test>tests?|testing|pred|prediction))(?:set|data)?(?![a-z])")
NO_CLASS = re.compile(  # folders that are parts of a data set
    r"images?|imgs?|gt|unlabell?ed|(.+[\W_])?(masks|segmentations?|labels|annotations|ground_?truth)|"
    r"(k?fold|cv|part|subset|split|chunk|shard|batch)s?[\W_]*\d+", re.IGNORECASE)
NO_NAME = set(  # words of file names that say where a picture comes from, not what it shows
    "img image dsc dscf dscn dcim pxl mvi vid video clip p pic picture photo frame scan screenshot "
    "cam camera patient subject slice mask seg gt label labelled labeled unlabelled unlabeled fold "
    "part crop aug copy".split())
KAGGLE = re.compile(r"(cat|dog)\.\d+\.\w+", re.IGNORECASE)  # cat.0.jpg
OXFORD = re.compile(r"([^\W\d_]+(?:_[^\W\d_]+)*)_\d+\.\w+")  # Maine_Coon_1.jpg


def find_labels(images: list[Parts], lost: list[Parts], files: Files, read: Callable[[str], bytes]
                ) -> tuple[str, dict[Parts, tuple[str, Parts, str]], Counter]:
    """How the images are labelled, in words; {path: (split, the parts below, class)} of those for
    training and validation, in order; {kind: images} of what is left out.

    lost: pictures that cannot be read, and empty folders. Raises InputError with the reason where
    the classes are not sure.
    """
    below = split_folders(images + lost)
    rests = {parts: rest for parts, (split, rest) in below.items() if split != "test"}
    layout, labels = classes_of(rests)
    places = {parts: (below[parts][0], rest, labels[parts]) for parts, rest in rests.items()}
    found = {parts: places[parts] for parts in images if parts in places}
    left_out = Counter({"test images": len(images) - len(found)})

    # a class of which nothing can be read
    filled = {(split, label) for split, _, label in found.values()}
    if empty := [parts for parts in lost if parts in places and places[parts][::2] not in filled]:
        raise InputError(f"a class has no image that can be read, only "
                         f"{listed(map('/'.join, empty), 3)}: add images, convert or remove it")

    # the official split of Oxford-IIIT Pet
    if layout == IN_NAMES and (splits := listed_splits(files, read)):
        stems = {parts: Path(parts[-1]).stem for parts in found}
        left_out["in neither list of annotations"] = sum(s not in splits for s in stems.values())
        found = {parts: (splits[stems[parts]], rest, label)
                 for parts, (_, rest, label) in found.items() if stems[parts] in splits}
        if not found:
            raise InputError("the lists in annotations name no image")
    return layout, {parts: found[parts] for parts in sorted(found, key=found.get)}, left_out


def role(name: str) -> str | None:
    """What a folder's name says: "train", "val", "test", or None. As in TrainSet, seg_train."""
    match = ROLE.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return match and match.lastgroup


def split_folders(paths: list[Parts]) -> dict[Parts, tuple[str, Parts]]:
    """{path: (split, the parts below)}. Split is "" where there are no such folders.

    Each folder must say train, val or test, train once and val at most once. Without val, split is
    "" for train, of which `batches.split` holds out some.
    """
    depth = len(os.path.commonprefix([parts[:-1] for parts in paths]))
    tops = {parts[depth] for parts in paths}
    roles = Counter(map(role, tops))
    flat = any(len(parts) == depth + 1 for parts in paths)
    if flat or roles[None] or roles["train"] != 1 or roles["val"] > 1:
        return {parts: ("", parts[depth:]) for parts in paths}
    below = {}
    for top in tops:
        of_top = [parts for parts in paths if parts[depth] == top]
        inner = os.path.commonprefix([parts[:-1] for parts in of_top])[depth + 1:]
        twice = bool(inner) and role(inner[0]) == role(top)  # Kaggle's zips unpack to train/train/
        split = role(top) if roles["val"] or role(top) == "test" else ""
        below |= {parts: (split, parts[depth + 1 + twice:]) for parts in of_top}
    return below


def classes_of(rests: dict[Parts, Parts]) -> tuple[str, dict[Parts, str]]:
    """How images are labelled, in words; {path: class}. rests: {path: the parts below splits}."""
    depths = {len(rest) for rest in rests.values()}
    middle, *more = {"/".join(rest[1:-1]) for rest in rests.values()}
    if depths == {1}:
        return IN_NAMES, classes_in_names(rests)

    # all at one depth, below class folders
    if len(depths) > 1 or more or not re.fullmatch("(?i)(images?|imgs?)?", middle):
        ordered = sorted(rests, key=lambda parts: (len(rests[parts]), parts))
        raise InputError(f"there are {'/'.join(ordered[0])} and {'/'.join(ordered[-1])}")
    labels = {parts: rest[0] for parts, rest in rests.items()}
    names = sorted(set(labels.values()))
    if all(map(role, names)) or any(map(NO_CLASS.fullmatch, names)):
        raise InputError(f"{listed(names)} may be parts of the data set")
    animals = {(labels[parts], match[1].lower()) for parts in rests
               if (match := KAGGLE.fullmatch(parts[-1]))}
    if len(animals) > len(dict(animals)):
        raise InputError(f"{listed(sorted(dict(animals)))} hold cats and dogs, by the names of "
                         "their files")
    return "class folders" + (f", one deeper: {middle}" if middle else ""), labels


def classes_in_names(paths: Iterable[Parts]) -> dict[Parts, str]:
    """{path: class} by the name of the file: all as cat.0.jpg, or all as Maine_Coon_1.jpg."""
    form = max((KAGGLE, OXFORD), key=lambda form: sum(bool(form.fullmatch(p[-1])) for p in paths))
    matches = {parts: form.fullmatch(parts[-1]) for parts in paths}
    if unknown := [parts[-1] for parts, match in matches.items() if not match]:
        raise InputError(f"the names of {len(unknown):,} of {len(matches):,} images give no class: "
                         f"{listed(unknown, 3)}")
    labels = {parts: match[1].lower() if form is KAGGLE else match[1]
              for parts, match in matches.items()}
    if unknown := [name for name in sorted(set(labels.values()))
                   if role(name) or NO_NAME & set(name.lower().split("_"))]:
        raise InputError(f"names say a split or a source, not a class: {listed(unknown, 3)}")
    return labels


def listed_splits(files: Files, read: Callable[[str], bytes]) -> dict[str, str]:
    """{stem: "train" or "val"} by Oxford-IIIT Pet's lists in the folder annotations, or {}."""
    splits = {}
    for base, split in (("trainval.txt", "train"), ("test.txt", "val")):
        found = [name for name in files if f"/{name}".endswith(f"/annotations/{base}")]
        if len(found) != 1:
            return {}
        for line in read(found[0]).decode(errors="replace").splitlines():
            if line.strip() and not line.startswith("#"):
                splits[line.split()[0]] = split
    return splits


def check_classes(splits: Iterable[str], labels: Iterable[str]) -> list[str]:
    """The split and the class of each image -> the classes, sorted. Raises InputError if there are
    fewer than two, if one has two spellings, or if train and val have other ones."""
    found = set(zip(splits, labels, strict=True))
    train, val = ({label for split, label in found if split == side} for side in ("train", "val"))
    if train != val:
        raise InputError(f"the classes of train and val differ: {listed(sorted(train ^ val))}")
    classes, spellings = sorted({label for _, label in found}), {}
    if len(classes) < 2:
        raise InputError(f"only one class found: {listed(classes)}")
    for name in classes:
        other = spellings.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other != name:
            raise InputError(f"one class has two spellings, {other!a} and {name!a}")
    return classes
