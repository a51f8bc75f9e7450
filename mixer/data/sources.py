"""The files of a folder or a zip, and which of them are images."""
import io
import itertools
import os
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ..runtime.errors import InputError, first_line, listed, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
UNREAD = tuple("." + ending for ending in (  # of pictures that are counted, never decoded
    "arw avif cr2 dcm dng exr heic heif jfif jp2 jpe jxl nef pgm ppm psd raw tga tif tiff".split()))
SYSTEM = re.compile(  # what systems leave, and what is hidden, but not a run's .lock
    r"\.(?!lock$)|@(eaDir|Recycle|Recently-Snapshot|tmp|__thumb)|#(recycle|snapshot)$|__MACOSX$|"
    r"\$RECYCLE\.BIN$|RECYCLER$|lost\+found$|System Volume Information$|(eh)?thumbs.*\.db$|"
    r"desktop\.ini$", re.IGNORECASE)
FIGURES = re.compile(  # of our own commands
    r"(acc|attention|curves|filters|loss|mistakes|val_acc_flops|val_acc_seconds)\.png")
MASK = re.compile(r"(.+)[_-](mask|seg|segmentation|gt|label)(_?\d+)?", re.IGNORECASE)

Parts = tuple[str, ...]  # of a path; the last one of a folder's path is ""
Files = dict[str, tuple[int, int]]  # {name with slashes: (bytes, time in ns; in a zip the CRC-32)}


def base_name(path: Path | str) -> str:
    """The last component of a path, also for "." and ".."."""
    return os.path.basename(os.path.abspath(path)) or str(path)


def open_source(path: Path | str, nested: Sequence[str] = ("train.zip",)
                ) -> tuple[Files, Callable[[str], bytes]]:
    """The files of a folder or a zip, without hidden ones and those of systems, and a function that
    reads one by its name. Names of folders end with a slash.

    If a zip holds a zip with one of the names `nested`, and no images (Kaggle's nesting), the files
    are those of the inner one. Raises InputError if it cannot be read.
    """
    if os.path.isdir(path):
        return _list_folder(path), lambda name: Path(path, name).read_bytes()
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise InputError(f"--data: {path or 'an empty path'} does not exist, or is neither a "
                         "folder nor a file")
    archive, members = _open_zip(path, nested)
    lock = threading.Lock()

    def read(name):
        with lock:  # the zip has one file position
            return archive.read(members[name])
    return {name: (info.file_size, info.CRC) for name, info in members.items()
            if not any(map(SYSTEM.match, name.split("/")))}, read


def _list_folder(root):
    files, seen = {}, set()

    def refuse(e):
        raise InputError(f"--data: {e.filename} cannot be read: {e.strerror}") from e
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(folder)) in seen:
            raise InputError(f"--data: {folder} links to a folder that was already found: "
                             "its images would count twice")
        seen.add(real)
        folders[:] = [name for name in folders if not SYSTEM.match(name)]
        base = Path(folder).relative_to(root)
        files |= {f"{(base / name).as_posix()}/": (0, 0) for name in folders}
        for name in itertools.filterfalse(SYSTEM.match, names):
            path, stamp = Path(folder, name), (0, 0)
            if path.is_file():
                stamp = path.stat().st_size, path.stat().st_mtime_ns
            elif path.exists():  # a named pipe; `read` reports a dangling link
                continue
            files[(base / name).as_posix()] = stamp
    return files


def _open_zip(path, nested):
    """The ZipFile, and {name: ZipInfo}."""
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        inner = [name for name in names if os.path.basename(name).lower() in nested]
        if inner and not any(name.lower().endswith(EXTENSIONS) for name in names):
            archive = zipfile.ZipFile(io.BytesIO(archive.read(inner[0])))
    except Exception as e:  # on hostile bytes, zipfile raises nearly every exception type
        raise InputError(f"--data: {path} is not a zip file, or is damaged ({first_line(e)}); "
                         "unpack a tar, 7z or rar and give the folder") from e
    members = {info.filename: info for info in archive.infolist()}
    for name, info in members.items():
        if info.flag_bits & 1 or info.compress_type == 9:
            raise InputError(f"--data: {name} in {path} is encrypted or compressed by Deflate64, "
                             "which Python does not read: unpack the zip and give the folder")

    # some programs write \\ or ./; but \\ may be the second byte of a letter (code page 932, Big5)
    if not any("/" in name for name in members):
        members = {re.sub(r"(?<=[\x00-\x7f])\\", "/", name): members[name] for name in members}
    return archive, {re.sub(r"(?<![^/])\.?/+", "", name): members[name] for name in members}


def sort_files(path: Path | str, files: Files) -> tuple[list[Parts], list[Parts], Counter]:
    """The images; pictures that are not read, and empty folders; {kind: files} of what is left out.

    Raises InputError, which says what is there instead, where there is no image.
    """
    images, lost, left_out, names = [], [], Counter(), sorted(files)
    stems = {os.path.splitext(name)[0] for name in names}
    for name, following in itertools.pairwise([*names, ""]):
        parts, (stem, ending) = tuple(name.split("/")), os.path.splitext(name)
        ending, mask = ending.lower(), MASK.fullmatch(stem)
        if ending in UNREAD:
            lost.append(parts)
            left_out[ending] += 1
        elif name.endswith("/") and not following.startswith(name):
            lost.append(parts)
        elif ending in EXTENSIONS and FIGURES.fullmatch(parts[-1]):
            left_out["figures of results"] += 1
        elif ending in EXTENSIONS and (mask and mask[1] in stems or "trimaps" in parts):
            left_out["masks"] += 1
        elif ending in EXTENSIONS:
            images.append(parts)
    if not images:
        zips = [printable(name) for name in names if name.lower().endswith(".zip")]
        hint = (f"for the zip in it, give its own path (unpacked): {zips[0]}" if zips else
                left_out_note(left_out) or f"it contains {len(names):,} other files")
        raise InputError(f"--data: no images in {path} (looked for {' '.join(EXTENSIONS)}); {hint}")
    return images, lost, left_out


def left_out_note(counts: Counter) -> str:
    """{".tif": 2, "masks": 1} -> "left out: .tif 2, masks 1"; "" for nothing."""
    counts = [f"{name} {count:,}" for name, count in counts.most_common() if count]
    return f"left out: {listed(counts)}" if counts else ""
