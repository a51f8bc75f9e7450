"""Image files and zips of them."""
import io
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mixer.data.images import ImageSet


def encoded(mode="RGB", size=(40, 30), format="JPEG", colour=None, **options) -> bytes:
    """A picture of one colour as a file."""
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, format, **options)
    return data.getvalue()


def load(images: ImageSet, index: int, size: int) -> np.ndarray:
    """Image `index`, decoded: uint8 (size, size, 3)."""
    return images.decode(images.read(index), size)


def png(width: int, height: int, depth: int, colour_type: int, *chunks) -> bytes:
    """A PNG file of these chunks (kind, data)."""
    def chunk(kind, data):
        length, crc = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return length + kind + data + crc
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


def zipped(members: Mapping[str, bytes]) -> bytes:
    """{name: content} -> a zip file; every second member is compressed."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z:
        for i, (name, content) in enumerate(members.items()):
            z.writestr(name, content, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
    return data.getvalue()


def folder_and_zip(root: Path, members: Mapping[str, bytes] | list[str]) -> tuple[Path, Path]:
    """Both with the same files: {name: content}, or names of equal pictures. A name that ends with
    a slash is an empty folder, and not in the zip."""
    if not isinstance(members, Mapping):
        members = dict.fromkeys(members, encoded())
    for name, content in members.items():
        path = root / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(content)
    (root / "archive.zip").write_bytes(zipped({name: members[name] for name in members
                                               if not name.endswith("/")}))
    return root / "folder", root / "archive.zip"


def copied(pictures: Path, root: Path, name_of) -> Path:
    """`root` with a copy of each picture: as name_of(number, its name), which may have folders."""
    for number, picture in enumerate(sorted(pictures.iterdir())):
        path = root / name_of(number, picture.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, path)
    return root
