"""Which files are images, and what their paths say: the split and the class of each.

Labels are never guessed: what might be a split, a fold, a mask or a copy is refused.
"""
import itertools
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import InputError, listed, printable
from .sources import EXTENSIONS, Files

UNREAD = tuple("." + ending for ending in (  # formats that are counted, never decoded
    "arw avif cr2 dcm dng exr heic heif jfif jp2 jpe jxl nef pgm ppm psd raw tga tif tiff".split()))
FIGURES = re.compile(  # what our own commands draw
    r"(acc|attention|curves|filters|loss|mistakes|val_acc_flops|val_acc_seconds)\.png")
MASK = re.compile(r"(.+)[_-](mask|seg|segmentation|gt|label)(_?\d+)?", re.IGNORECASE)
ROLE = re.compile(  # in folders' names
    r"(?<![a-z])(?:(?P<train>train|training|trainval)|"
    r"(?P<val>val|valid|validation|dev|eval|evaluation|(?:hold|held)[_-]?out)|"
    r"(?P<test>tests?|testing|pred|prediction))(?:set|data)?(?![a-z])")
NOT_CLASS_FOLDERS = re.compile(  # folders that are parts of a data set
    r"images?|imgs?|gt|unlabell?ed|jpegimages|segmentation(class|object)|"
    r"(.+[\W_])?(masks|segmentations?|labels|annotations|ground_?truth)|"
    r"(.+[\W_])?(image|img|k?fold|cv|part|subset|split|chunk|shard|batch)s?[\W_]*\d+",
    re.IGNORECASE)
IN_NAMES = "class in the file name"
KAGGLE = re.compile(r"(cat|dog)\.\d+\.\w+", re.IGNORECASE)  # cat.0.jpg
OXFORD = re.compile(r"([^\W\d_]+(?:_[^\W\d_]+)*)_\d+\.\w+")  # Maine_Coon_1.jpg
NOT_CLASS_WORDS = set(  # in file names they say where a picture comes from, not what it shows
    "img image dsc dscf dscn dcim pxl mvi vid video clip p pic picture photo frame scan screenshot "
    "cam camera patient subject slice mask seg gt label labelled labeled unlabelled unlabeled fold "
    "part crop aug copy".split())


@dataclass
class Picture:
    """A picture, or an empty folder, and what its path says."""

    name: str               # with slashes; a folder's ends with one
    parts: tuple[str, ...]  # the path's; find_splits drops common and split folders
    readable: bool          # not in another format, and no folder
    split: str = ""         # "train" or "val" where both have a folder, or "test"
    label: str = ""         # the class


def sort_files(path: Path | str, files: Files) -> tuple[list[Picture], Counter]:
    """The pictures and empty folders; {kind: number of files left out}.

    Raises InputError if there is no image; it says what is there instead.
    """
    pictures, left_out, names = [], Counter(), sorted(files)
    stems = {os.path.splitext(name)[0] for name in names}

    # each file: a picture, or left out; an empty folder may be a class
    for name, following in itertools.pairwise([*names, ""]):
        parts, (stem, ending) = tuple(name.split("/")), os.path.splitext(name)
        ending, mask = ending.lower(), MASK.fullmatch(stem)
        if ending in UNREAD or name.endswith("/") and not following.startswith(name):
            pictures.append(Picture(name, parts, readable=False))
            left_out[ending] += bool(ending)
        elif ending in EXTENSIONS and FIGURES.fullmatch(parts[-1]):
            left_out["figures of results"] += 1
        elif ending in EXTENSIONS and (mask and mask[1] in stems or "trimaps" in parts):
            left_out["masks"] += 1
        elif ending in EXTENSIONS:
            pictures.append(Picture(name, parts, readable=True))

    # what is there instead of images
    if not any(picture.readable for picture in pictures):
        zips = [printable(name) for name in names if name.lower().endswith(".zip")]
        hint = (f"it contains {zips[0]}: give that zip itself (unpacked)" if zips else
                left_out_note(left_out) or f"it contains {len(names):,} other files")
        raise InputError(f"--data: no images in {path} (looked for {' '.join(EXTENSIONS)}); {hint}")
    return pictures, left_out


def left_out_note(counts: Counter) -> str:
    """{".tif": 2, "masks": 1} -> "left out: .tif 2, masks 1"; "" for nothing."""
    counts = [f"{name} {count:,}" for name, count in counts.most_common() if count]
    return f"left out: {listed(counts)}" if counts else ""


def label_pictures(pictures: list[Picture], files: Files, read: Callable[[str], bytes],
                   left_out: Counter) -> tuple[str, list[Picture]]:
    """Set splits and classes. Returns the layout in words, and the training and validation images,
    sorted; counts the others. Raises InputError with the reason if the classes are ambiguous.
    """
    # the classes by folders or names, without test images
    find_splits(pictures)
    labelled = [picture for picture in pictures if picture.split != "test"]
    layout = find_classes(labelled)
    images = [picture for picture in labelled if picture.readable]
    left_out["test images"] = sum(picture.readable for picture in pictures) - len(images)
    filled = {(image.split, image.label) for image in images}
    if empty := [p.name for p in labelled if (p.split, p.label) not in filled]:
        raise InputError(f"a class has no readable image, only {listed(empty, 3)}: convert or "
                         "remove it")

    # the official split of Oxford-IIIT Pet
    if layout == IN_NAMES and (splits := listed_splits(files, read)):
        for image in images:
            image.split = splits.get(Path(image.name).stem)
        left_out["in neither list of annotations"] = sum(not image.split for image in images)
        images = [image for image in images if image.split]
    check_classes(images)
    return layout, sorted(images, key=lambda image: (image.split, image.parts))


def role(name: str) -> str | None:
    """What a folder's name says: "train", "val", "test", or None. As in TrainSet, seg_train."""
    match = ROLE.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return match and match.lastgroup


def find_splits(pictures: list[Picture]) -> None:
    """Set each picture's split, and cut its parts down to those below common and split folders.

    There are splits only if every top folder says train, val or test, train once and val at most
    once. Without val, train keeps "": `split` in split.py then holds out some of it.
    """
    # below the folders that all share, by the first folder
    depth, tops = len(os.path.commonprefix([p.parts[:-1] for p in pictures])), defaultdict(list)
    for picture in pictures:
        picture.parts = picture.parts[depth:]
        tops[picture.parts[0]].append(picture)
    # do these folders name splits?
    roles = Counter(map(role, tops))
    flat = any(len(picture.parts) == 1 for picture in pictures)
    if flat or roles[None] or roles["train"] != 1 or roles["val"] > 1:
        return
    # then they are cut off, too
    for top, inside in tops.items():
        split, folders = role(top), os.path.commonprefix([p.parts[:-1] for p in inside])
        twice = len(folders) > 1 and role(folders[1]) == split  # Kaggle's zips have train/train/
        for picture in inside:
            picture.parts = picture.parts[1 + twice:]
            picture.split = split if roles["val"] or split == "test" else ""


def find_classes(pictures: list[Picture]) -> str:
    """Set the labels, from folders or names. Returns the layout in words."""
    # no folders: from names
    depths = {len(picture.parts) for picture in pictures}
    middle, *more = {"/".join(picture.parts[1:-1]) for picture in pictures}
    if depths == {1}:
        find_classes_in_names(pictures)
        return IN_NAMES

    # all at one depth, below class folders
    if len(depths) > 1 or more or not re.fullmatch("(?i)(images?|imgs?)?", middle):
        ordered = sorted(pictures, key=lambda picture: (len(picture.parts), picture.name))
        raise InputError("images lie at different depths, or in different subfolders: "
                         f"{ordered[0].name} and {ordered[-1].name}")
    for picture in pictures:
        picture.label = picture.parts[0]
    names = sorted({picture.label for picture in pictures})
    roles = set(map(role, names))
    if None not in roles or len(roles) > 2 or any(map(NOT_CLASS_FOLDERS.fullmatch, names)):
        raise InputError(f"{listed(names)} may be parts of the data set")
    # a folder of cats and dogs is not one class
    animals = {(picture.label, match[1].lower()) for picture in pictures
               if (match := KAGGLE.fullmatch(picture.parts[-1]))}
    if len(animals) > len(dict(animals)):
        raise InputError(f"{listed(sorted(dict(animals)))} hold cats and dogs, by the names of "
                         "their files")
    return "class folders" + (f", one deeper: {middle}" if middle else "")


def find_classes_in_names(pictures: list[Picture]) -> None:
    """Set the labels from names: all like cat.0.jpg, or all like Maine_Coon_1.jpg."""
    names = [picture.parts[0] for picture in pictures]
    form = max((KAGGLE, OXFORD), key=lambda form: sum(map(bool, map(form.fullmatch, names))))
    if unknown := [name for name in names if not form.fullmatch(name)]:
        raise InputError(f"the names of {len(unknown):,} of {len(names):,} images give no class: "
                         f"{listed(unknown, 3)}")
    for picture, name in zip(pictures, names, strict=True):
        label = form.fullmatch(name)[1]
        picture.label = label.lower() if form is KAGGLE else label
    if unknown := [name for name in sorted({picture.label for picture in pictures})
                   if role(name) or NOT_CLASS_WORDS & set(name.lower().split("_"))]:
        raise InputError(f"names say a split or a source, not a class: {listed(unknown, 3)}")


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


def check_classes(images: list[Picture]) -> None:
    """Raise InputError if there are fewer than two classes, if one has two spellings, or if those
    of train and val differ."""
    # validation must ask what training taught
    train, val = ({image.label for image in images if image.split == split}
                  for split in ("train", "val"))
    if train != val:
        raise InputError(f"the classes of train and val differ: {listed(sorted(train ^ val))}")
    classes, spellings = sorted({image.label for image in images}), {}
    if len(classes) < 2:
        raise InputError(f"only one class found: {listed(classes)}")
    for name in classes:
        other = spellings.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other != name:
            raise InputError(f"one class has two spellings, {other!a} and {name!a}")
