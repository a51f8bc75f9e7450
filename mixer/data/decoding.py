"""The bytes of an image file -> upright RGB pixels. Only FORMATS are decoded."""
import io

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
MAX_PIXELS = 64_000_000   # a larger picture counts as damaged; 64 MP decode to 192 MB
DECODING = 2              # raise this when `decode` changes: cached images are then decoded again
ORIENTATION = 0x0112      # the EXIF tag, and what makes each of its values upright
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


def decode(data: bytes, size: int) -> np.ndarray:
    """bytes of one image file -> uint8 array (size, size, 3): upright RGB, resized to a square.

    Bilinear and antialiased. Applies the EXIF rotation, puts transparency on white, scales 16-bit
    grey to 8 bits, takes the first frame of an animation. Metadata that is damaged or too large
    costs nothing but itself. Raises ValueError with the fault.
    """
    if not data:
        raise ValueError("empty file")
    try:
        try:
            return _decode(data, size)
        except Exception:
            if (bare := without_metadata(data)) == data:
                raise
            return _decode(bare, size)
    except Image.UnidentifiedImageError:
        raise ValueError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as e:  # on hostile bytes, Pillow raises nearly every exception type
        raise ValueError(str(e) or type(e).__name__) from e


def _decode(data, size):
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        W, H = image.size
        if W * H > MAX_PIXELS:
            raise ValueError(f"{W}x{H} pixels are over the limit of {MAX_PIXELS:,}")
        image.load()  # all of it: `verify` does not notice a truncated file
        orientation = _orientation(image)
        image = _on_white(image, data)
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _orientation(image):
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF is none
        return None


def _on_white(image, data):
    """A loaded image in RGB, its transparent parts white."""
    key = image.info.get("transparency")  # of a PNG without alpha: the one transparent colour
    depth = data[24] if image.format == "PNG" else 8  # bits per sample; Pillow gives 8, or 16 grey
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        image = np.where(grey == key, 255, (grey >> 8).clip(0, 255)).astype(np.uint8)
        image = Image.fromarray(image)
    elif depth == 16 and isinstance(key, tuple):
        high, low = np.array(image), _low_bytes(data)
        high[(high * np.uint16(256) + low == key).all(axis=2)] = 255
        image = Image.fromarray(high)
    elif depth < 8 and image.mode == "L" and key is not None:
        image.info["transparency"] = key * 255 // (2 ** depth - 1)  # as the pixels were scaled
    if image.has_transparency_data:
        image = image.convert("RGBA")
        # a 32-bit BMP without alpha leaves zeros in its place
        if image.getextrema()[3] != (0, 0) or not data.startswith(b"BM"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy RGB, too


def _low_bytes(data):
    """The low bytes of a 16-bit RGB PNG, of which Pillow gives the high ones: uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        tile, = image.tile  # a plain tuple in Pillow 10, a named one since
        image.tile = [getattr(tile, "_make", tuple)((*tile[:3], "RGB;16L"))]
        return np.array(image)


def without_metadata(data: bytes) -> bytes:
    """A JPEG or PNG file without what its pixels do not need, except EXIF. Others are unchanged."""
    view, kept = memoryview(data), []
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        at, needed = 8, (b"tRNS", b"eXIf")
        while at + 8 <= len(data):
            kind = data[at + 4:at + 8]
            end = at + 12 + int.from_bytes(data[at:at + 4], "big")
            if kind[:1].isupper() or kind in needed:
                kept.append(view[at:end])
            at = end
        return b"".join([data[:8], *kept])
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at:at + 1] == b"\xff" and (kind := data[at + 1:at + 2]) != b"\xda":  # the scan
            end = at + 2 + int.from_bytes(data[at + 2:at + 4], "big")
            needed = kind == b"\xee" or data[at + 4:at + 8] == b"Exif"  # 0xee: the colour model
            if needed or not (b"\xe0" <= kind <= b"\xef" or kind == b"\xfe"):
                kept.append(view[at:end])
            at = end
        return b"".join([data[:2], *kept, view[at:]])
    return data
