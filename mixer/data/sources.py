"""The files of a folder or a zip."""
import io
import itertools
import os
import re
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..runtime.errors import InputError, first_line, listed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
SYSTEM = re.compile(  # what systems leave, and what is hidden, but not a run's .lock
    r"\.(?!lock$)|@(eaDir|Recycle|Recently-Snapshot|tmp|__thumb)|#(recycle|snapshot)$|__MACOSX$|"
    r"\$RECYCLE\.BIN$|RECYCLER$|lost\+found$|System Volume Information$|(eh)?thumbs.*\.db$|"
    r"desktop\.ini$", re.IGNORECASE)

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
        raise InputError(f"--data: {path} does not exist, or is neither a folder nor a file")
    archive, members = _open_zip(path, nested)
    lock = threading.Lock()

    def read(name):
        with lock:  # the zip has one file position
            return archive.read(members[name])
    return {name: (info.file_size, info.CRC) for name, info in members.items()
            if not any(map(SYSTEM.match, name.split("/")))}, read


def _list_folder(root):
    """The Files below a folder. Links are followed; a folder that is found twice is an error."""
    # no folder twice, and none that cannot be read
    files, seen = {}, set()

    def refuse(e):
        raise InputError(f"--data: {e.filename} cannot be read: {e.strerror}") from e
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(folder)) in seen:
            raise InputError(f"--data: {folder} links to a folder that was already found: "
                             "its images would count twice")
        seen.add(real)

        # folders first, then files
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
    # the archive, or the only one in it
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        inner = [name for name in names if os.path.basename(name).lower() in nested]
        if any(name.lower().endswith(EXTENSIONS) for name in names):
            inner = []
        if len(inner) == 1:
            archive = zipfile.ZipFile(io.BytesIO(archive.read(inner[0])))
    except Exception as e:  # on hostile bytes, zipfile raises nearly every exception type
        raise InputError(f"--data: {path} is not a zip file, or is damaged ({first_line(e)}); "
                         "unpack a tar, 7z or rar and give the folder") from e
    if len(inner) > 1:
        raise InputError(f"--data: {path} holds {listed(inner)}: unpack it and give the folder")
    members = {_name(info): info for info in archive.infolist()}
    for name, info in members.items():
        if info.flag_bits & 1 or info.compress_type == 9:
            raise InputError(f"--data: {name} in {path} is encrypted or compressed by Deflate64, "
                             "which Python does not read: unpack the zip and give the folder")

    # some programs write \\ or ./; but \\ may be the second byte of a letter (code page 932, Big5)
    if not any("/" in name for name in members):
        members = {re.sub(r"(?<=[\x00-\x7f])\\", "/", name): members[name] for name in members}
    return archive, {re.sub(r"(?<![^/])\.?/+", "", name): members[name] for name in members}


def _name(info):
    """The name of a zip's member, as UTF-8 where its bytes are: Macs write it without the flag."""
    try:
        return info.filename if info.flag_bits & 0x800 else info.filename.encode("cp437").decode()
    except UnicodeError:  # another code page: unreadable, and distinct
        return info.filename
