"""Image files and zips of them."""
import io
import zipfile
from collections.abc import Mapping

from PIL import Image


def encoded(mode="RGB", size=(40, 30), format="JPEG", colour=None, **options) -> bytes:
    """A picture of one colour as a file."""
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, format, **options)
    return data.getvalue()


def zipped(members: Mapping[str, bytes]) -> bytes:
    """{name: content} -> a zip file; every second member is compressed."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z:
        for i, (name, content) in enumerate(members.items()):
            z.writestr(name, content, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
    return data.getvalue()
