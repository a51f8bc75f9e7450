"""What the folders and names of a data set mean: outer folders, splits and classes.

Folders whose words say train, val or test are splits. Parts of a data set that might be taken for
classes (folds, masks, a second copy) are refused by name: labels are never guessed.
"""
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.errors import InputError, listed, printable

ROLES = {word: role for role, words in {
    "train": "train training trainval", "val": "val valid validation dev",
    "test": "test tests testing pred predict prediction predictions"}.items()
    for word in words.split()}
SUFFIX = r"(?<=[a-z])(set|data|images?|imgs?)\b"  # as in trainset; alone, it is a word of PLAIN
PLAIN = set("set sets data dataset datasets image images img imgs picture pictures photo photos "
            "split splits".split())  # words that say nothing
PARTS = set("fold folds kfold cv part parts subset chunk shard batch mask masks label labels "
            "annotation annotations groundtruth gt trimaps eval evaluation holdout unlabeled "
            "unlabelled extra".split())  # words of folders that are no classes
CAMERAS = set("img image dsc dscf dscn dcim pxl mvi vid p pic picture photo frame scan "
              "screenshot".split())  # words that a camera or a program begins names with


@dataclass
class Layout:
    """Where the class folders, or the images of all classes, stand."""

    outer: tuple[str, ...]      # folders that contain everything
    splits: dict[str, str] = field(default_factory=dict)  # folder -> train, val or test, if any
    inner: dict[str, str] = field(default_factory=dict)   # split folder -> the one folder in it

    def place(self, parts: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
        """The parts of a path -> its split and the parts below; None for what stands elsewhere."""
        depth = len(self.outer)
        if parts[:depth] != self.outer or len(parts) == depth:  # a file may be called as a folder
            return None
        if not self.splits:
            return "", parts[depth:]
        if len(parts) < depth + 2 or parts[depth] not in self.splits:
            return None
        depth, folder = depth + 1, parts[depth]
        if len(parts) > depth + 1 and parts[depth] == self.inner.get(folder):
            depth += 1
        return self.splits[folder], parts[depth:]


def find_layout(path: Path, images: list[tuple[str, ...]],
                others: list[tuple[str, ...]]) -> Layout:
    """The layout of `images`, given as the parts of their paths.

    others: folders, whose last part is "", and files that may belong to a class without images.
    Raises InputError where folders are parts of a data set, and not surely train and val.
    """
    # without outer folders that contain everything
    outer = ()
    while not any(len(parts) == len(outer) + 1 for parts in images):
        folders = {parts[len(outer)] for parts in images}
        beside = _folders_below(others, outer) - folders
        if len(folders) > 1 or (role(*folders) in ROLES.values()
                                and any(role(name) in ("train", "val") for name in beside)):
            break
        outer += tuple(folders)
    else:
        return Layout(outer)

    # what each folder holds: its class folders, or the classes in its file names
    below = defaultdict(list)
    for parts in images:
        below[parts[len(outer)]].append(parts[len(outer) + 1:])
    common = set.intersection(*(set(_words(name)) for name in below)) if len(below) > 1 else set()
    roles = {name: role(name, common) for name in below}
    inner, subfolders, holds = {}, {}, {}
    for name, contents in below.items():
        first = {parts[0] if len(parts) > 1 else "" for parts in contents}
        if len(first) == 1 and (only := min(first)) and (
                only.casefold() == name.casefold() or (role(only) and role(only) == roles[name])):
            inner[name] = only  # Kaggle's zips unpack to train/train/
            contents = [parts[1:] for parts in contents]
        subfolders[name] = {parts[0].casefold() for parts in contents if len(parts) > 1}
        labels = {cat_or_dog(parts[0]) for parts in contents}
        holds[name] = subfolders[name] or (labels if None not in labels else set())

    # surely splits
    counts = [list(roles.values()).count(kind) for kind in ("train", "val", "test")]
    if sum(counts) == len(roles) and counts[0] <= 1 and counts[1] <= 1:
        for name in sorted(_folders_below(others, outer) - set(roles)):
            if role(name, common) in ("train", "val"):
                raise InputError(f"--data: the folder {printable(name)} in {path} holds no image "
                                 "that can be read: add images or remove it")
    if sum(counts) == len(roles) and counts[0] == 1 and counts[1] <= 1:
        # without val, `batches.split` will choose some of train
        splits = {name: kind if kind != "train" or counts[1] else ""
                  for name, kind in roles.items()}
        return Layout(outer, splits, {name: inner[name] for name in inner})

    # surely not classes
    several = {name for name in holds if len(holds[name]) > 1}
    same = len(several) > 1 and len({frozenset(holds[name]) for name in several}) == 1
    names = {name.casefold() for name in below}
    said = [{ROLES[word] for word in _words(name) if word in ROLES} for name in below]
    if all(said) and not all(roles.values()) and len(set.union(*said)) > 1:  # as cats_train
        raise InputError(f"--data: {path} holds parts of a data set, not classes: "
                         f"{listed(sorted(below))}; make folders train and val, with a folder for "
                         "each class in them")
    if same or all(roles.values()) or any(
            len(subfolders[name] & names - {name.casefold()}) > 1  # a copy of all beside it
            or roles[name] and any(holds[name] & holds[other] for other in holds if other != name)
            or roles[name] == "train" and not any(subfolders[other] for other in holds
                                                  if other != name) for name in several):
        raise _not_classes(path, outer, sorted(below), roles, several, min(
            (holds[name] for name in several), key=len, default=set()) if same else set())
    return Layout(outer)


def _folders_below(others, outer):
    return {parts[len(outer)] for parts in others
            if parts[:len(outer)] == outer and len(parts) > len(outer) + 1}


def _not_classes(path, outer, names, roles, several, held):
    """The error that names the folders and the path to give instead."""
    problem = f"--data: {path} holds parts of a data set, not classes: {listed(names)}"
    if held:
        problem += f", each with {listed(sorted(held), 5)}"
        if all(role(name) for name in held) and not any(roles.values()):
            return InputError(f"{problem}; put train and val above the class folders, as in "
                              f"train/{printable(names[0])} and val/{printable(names[0])}")
    trains = [name for name in names if roles[name] == "train"]
    best = (trains or sorted(several) or names)[0]
    give = (f"give one of them, such as {path.joinpath(*outer, best)}" if path.is_dir() else
            f"unpack it and give one of its folders, such as {'/'.join([*outer, best])}")
    return InputError(f"{problem}; {printable(give)}, or keep one train and at most one val folder")


def _words(name):
    """The words of a folder's name in lower case, without numbers and versions."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return re.sub(SUFFIX, " ", re.sub(r"[\W_]+|v?\d+", " ", spaced)).split()


def role(name: str, common: Iterable[str] = ()) -> str | None:
    """What the words of a folder say: train, val, test, another "part", or None.

    common: words of all folders beside it, such as seg in seg_train and seg_test.
    """
    words = _words(name)
    telling = [word for word in words if word not in PLAIN]
    if words and not telling:
        return "part"
    telling = [word for word in telling
               if word in ROLES or word in PARTS or word not in common]
    if len(telling) != 1:
        return None
    return ROLES.get(telling[0]) or ("part" if telling[0] in PARTS else None)


def cat_or_dog(file: str) -> str | None:
    """Of cat.0.jpg, "cat"."""
    match = re.match(r"(cat|dog)\.", file, re.IGNORECASE)
    return match and match[1].lower()


def name_before_number(file: str) -> str | None:
    """Of Abyssinian_1.jpg, "Abyssinian", as in Oxford-IIIT Pet. Not of dates and cameras' names."""
    match = re.fullmatch(r"([^\W\d_].*)_\d+\.\w+", file)
    if not match or re.search(r"\d{4}", match[1]) or set(_words(match[1])) <= CAMERAS:
        return None
    return match[1]


def naming(path: Path, files: Sequence[str], hint: str = "") -> Callable[[str], str | None]:
    """The function that gives the class of a file's base name. All `files` have one.

    Raises InputError, which ends with `hint`, where there is none.
    """
    for label in (cat_or_dog, name_before_number):
        if all(map(label, files)):
            return label
    count = f"{len(files):,} images"
    unknown = [file for file in files if not cat_or_dog(file)]
    if len(unknown) < len(files):
        raise InputError(f"--data: {len(unknown):,} of {count} in {path} are named neither cat.* "
                         f"nor dog.*: {listed(unknown)}; rename them or move them away")
    unknown = [file for file in files if not name_before_number(file)]
    if len(unknown) < len(files) / 2:
        raise InputError(f"--data: {len(unknown):,} of {count} in {path} are not named class_1: "
                         f"{listed(unknown)}; rename them or move them away")
    raise InputError(f"--data: only one class found in {path}: all {count} are in one folder "
                     f"and none is named cat.* or dog.*, nor all class_1 ({listed(unknown, 3)}); "
                     f"rename them, or make a folder for each class{hint}")


def listed_split(trainval: bytes, test: bytes) -> dict[str, str]:
    """Oxford-IIIT Pet's two lists -> {name without its ending: train or val}."""
    splits = {}
    for text, split in ((trainval, "train"), (test, "val")):
        for line in text.decode(errors="replace").splitlines():
            if line.strip() and not line.startswith("#"):
                splits[line.split()[0]] = split
    return splits
