import io
import struct

import numpy as np
import pytest
from PIL import Image

from mixer.data.decoding import decode
from tests.helpers.pictures import encoded, png

JPEG = encoded(colour=(200, 30, 30))


def test_decode_is_upright_rgb():
    left_red = Image.new("RGB", (40, 20), (0, 0, 255))
    left_red.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    data = io.BytesIO()
    left_red.save(data, "JPEG", exif=exif, quality=95)
    out = decode(data.getvalue(), 20)
    assert out[10, 3].argmax() == 2 and out[10, 16].argmax() == 0  # the red half is on the right


@pytest.mark.parametrize("data, expected", [
    (encoded("L", colour=100, format="PNG"), (100, 100, 100)),
    (encoded("CMYK", colour=(0, 255, 255, 0)), (254, 0, 0)),
    (encoded("P", colour=0, format="PNG"), (0, 0, 0)),
    (encoded("P", colour=0, format="GIF"), (0, 0, 0)),
    (encoded("RGBA", colour=(0, 0, 0, 0), format="PNG"), (255, 255, 255)),
    (encoded("LA", colour=(0, 0), format="PNG"), (255, 255, 255)),
    (encoded("I;16", colour=100 * 256, format="PNG"), (100, 100, 100)),
    (encoded("1", colour=1, format="PNG"), (255, 255, 255)),
    (encoded(colour=(10, 20, 30), format="BMP"), (10, 20, 30)),
    (encoded(colour=(10, 20, 30), format="WEBP", lossless=True), (10, 20, 30)),
], ids=["grey", "CMYK", "palette", "GIF", "RGBA", "LA", "16 bit", "1 bit", "BMP", "WebP"])
def test_every_mode_becomes_rgb(data, expected):
    out = decode(data, 12)
    assert out.shape == (12, 12, 3) and out.dtype == np.uint8
    assert np.abs(out.astype(int) - expected).max() <= 2  # JPEG's rounding


@pytest.mark.parametrize("data, fault", [
    (JPEG[:len(JPEG) // 2], "(?i)truncated"), (JPEG[:-40], "(?i)truncated"),
    *((data, "not a JPEG") for data in (b"", bytes(range(256)) * 8, encoded(format="TIFF"),
                                        b"<html><body>429 Too Many Requests</body></html>")),
    (png(60_000, 60_000, 8, 2), "exceeds limit"),
], ids=["cut in half", "cut at the end", "empty", "random", "TIFF", "HTML", "huge"])
def test_damaged_files_are_refused(data, fault):
    with pytest.raises(ValueError, match=fault):
        decode(data, 16)


@pytest.mark.parametrize("alpha, expected", [((0, 0), [10, 20]), ((0, 255), [255, 20])])
def test_a_bmp_whose_alpha_is_all_zero_is_opaque(alpha, expected):
    rows = b"".join(bytes([grey] * 3 + [a]) for grey, a in zip((10, 20), alpha, strict=True))
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks + bytes(52)
    data = b"BM" + struct.pack("<IHHI", 14 + 108 + 8, 0, 0, 14 + 108) + header + rows
    assert decode(data, 2)[0].tolist() == [[value] * 3 for value in expected]


def with_segment(data, kind, content):
    """A JPEG with one more segment at its beginning."""
    header = struct.pack(">BBH", 0xFF, kind, len(content) + 2)
    return data[:2] + header + content + data[2:]


@pytest.mark.parametrize("segment", [
    (0xE2, b"MPF\0II*\0\x08\0\0\0\0\0"), (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")])
def test_damaged_exif_is_no_fault_of_a_picture(segment):
    assert (decode(with_segment(JPEG, *segment), 8) == decode(JPEG, 8)).all()


def test_metadata_that_cannot_be_written_back_still_turns_the_picture():
    entry = struct.pack(">HHI4s", 0x0112, 3, 1, b"\0\3\0\0")                 # orientation
    entry += struct.pack(">HHII", 0x011A, 5, 1, 38) + bytes(4)               # an unsigned ratio
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + entry + struct.pack(">iI", -72, 1)
    picture = Image.new("L", (20, 10))
    picture.paste(255, (0, 0, 10, 10))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=95)
    out = decode(with_segment(data.getvalue(), 0xE1, exif), 20)
    assert out[10, 3].max() < 20 and out[10, 16].min() > 235
