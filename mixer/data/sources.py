"""The files of a folder or a zip, and which of them are images."""
import io
import os
import re
import stat
import zipfile
from collections.abc import Sequence
from fnmatch import translate
from pathlib import Path

from ..runtime.errors import InputError, first_line

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
UNREAD = tuple("." + ending for ending in (  # pictures, too: they are counted, never decoded
    "3fr ai apng arw avif bpg cr2 cr3 crw cur dcm dcr dds dib djvu dng emf eps erf exr fit fits "
    "hdr heic heif hif icns ico iiq j2k jfi jfif jif jp2 jpe jpf jpx jxl jxr kdc mef mos mpo mrw "
    "nef nrw orf pbm pcx pef pfm pgm pjp pjpeg pnm ppm psb psd qoi raf ras raw rw2 rwl sgi sr2 "
    "srf srw svg svgz tga tif tiff wdp wmf x3f xbm xcf xpm").split())
SYSTEM = re.compile("|".join(map(translate, (  # what systems leave among a user's files
    ".*", "__MACOSX", "@eaDir", "@Recycle*", "@Recently-Snapshot", "@__thumb", "@tmp", "@sharebin",
    "@Syno*", "#recycle", "#snapshot", "$RECYCLE.BIN", "$Extend", "RECYCLER", "lost+found",
    "System Volume Information", "FOUND.[0-9][0-9][0-9]", "Network Trash Folder",
    "Temporary Items", "TheVolumeSettingsFolder", "Thumbs.db", "ehthumbs*.db", "desktop.ini"))),
    re.IGNORECASE)
MAX_NESTED_BYTES = 2 * 2**30  # of a zip inside a zip, kept in memory; Kaggle's has 0.57e9


def ending(parts: Sequence[str]) -> str:
    """Of the last of the parts of a path, in lower case: ".jpg"."""
    return os.path.splitext(parts[-1])[1].lower()


def is_image(name: str) -> bool:
    """Whether a file has an image's ending, and neither it nor a folder of it is a system's."""
    parts = name.split("/")
    return ending(parts) in EXTENSIONS and not system_part(parts)


def system_part(parts: Sequence[str]) -> str | None:
    """The first of the parts of a path that is hidden, or that a system made for itself."""
    return next((part for part in parts if SYSTEM.match(part)), None)


class Folder:
    """The files and folders below a directory."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def list_files(self) -> dict[str, tuple[int, int]]:
        """{name relative to the folder, with forward slashes: (bytes, mtime in ns)}

        The name of a folder ends with a slash.
        """
        files, seen = {}, set()

        def is_system(folder):
            return system_part(Path(folder).relative_to(self.path).parts)

        def refuse(e):
            if not is_system(e.filename):
                raise InputError(f"--data: {e.filename} cannot be read: {e.strerror}") from e
        for folder, folders, names in os.walk(self.path, followlinks=True, onerror=refuse):
            for name in folders[:]:
                path = Path(folder, name)
                files[path.relative_to(self.path).as_posix() + "/"] = (0, 0)
                if path.is_symlink() and is_system(path):  # it may lead anywhere
                    folders.remove(name)
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                raise InputError(f"--data: {folder} links to a folder that was already found: "
                                 "its images would count twice")
            seen.add((status.st_dev, status.st_ino))
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self.path).as_posix()
                try:
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode):
                        files[relative] = (status.st_size, status.st_mtime_ns)
                except OSError:  # a dangling link: `load` reports it
                    files[relative] = (0, 0)
        return files

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Zip:
    """The members of a zip file, or of the zip inside it that has one of the names `nested`, if
    there are no images beside it (Kaggle's nesting)."""

    def __init__(self, path: Path | str, nested: Sequence[str] = ("train.zip",)):
        self.path, self.inner = Path(path), None  # inner: the bytes of the nested zip
        self._open()
        nested = [name for name in self.members if name.lower().split("/")[-1] in nested]
        if nested and not any(map(is_image, self.members)):
            info = self.members[nested[0]]
            if info.file_size > MAX_NESTED_BYTES:
                raise InputError(f"--data: {info.filename} in {path} has {info.file_size:,} bytes, "
                                 "too many to keep in memory: unpack it and give its own path")
            try:
                self.inner = self.zip.read(info)
            except Exception as e:
                raise InputError(f"--data: {info.filename} in {path} is damaged: "
                                 f"{first_line(e)}") from e
            self._open()

    def _open(self):
        try:
            self.zip = zipfile.ZipFile(self.path if self.inner is None else io.BytesIO(self.inner))
        except OSError as e:
            raise InputError(f"--data: {self.path} cannot be read: {e.strerror or e}") from None
        except Exception as e:  # on hostile bytes, zipfile raises nearly every exception type
            raise InputError(f"--data: {self.path} is not a zip file, or is truncated "
                             f"({first_line(e)})") from e
        self.opened_by = os.getpid()
        if any(info.flag_bits & 1 for info in self.zip.infolist()):
            raise InputError(f"--data: {self.path} is encrypted: unpack it with its password and "
                             "give the folder")
        # some write \\ or ./; the parts of a name stay what they are
        self.members = {re.sub(r"(?<![^/])\.?/+", "", info.filename.replace("\\", "/")): info
                        for info in self.zip.infolist()}

    def list_files(self) -> dict[str, tuple[int, int]]:
        """{member name: (bytes, CRC-32)}; the name of a folder ends with a slash."""
        return {name: (info.file_size, info.CRC) for name, info in self.members.items()}

    def read(self, name: str) -> bytes:
        if self.opened_by != os.getpid():  # a forked process must not share its file position
            self._open()
        return self.zip.read(self.members[name])
