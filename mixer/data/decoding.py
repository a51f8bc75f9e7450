"""The bytes of one image file -> upright RGB pixels."""
import contextlib
import io

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP")
DECODING = 2  # raise this when `decode` changes: cached images are then decoded again


def decode(data: bytes, size: int) -> np.ndarray:
    """bytes of one image file -> uint8 array (size, size, 3): upright RGB, resized to a square.

    Bilinear and antialiased. Applies the EXIF rotation, puts transparency on white, scales 16-bit
    grey to 8 bits, takes the first frame of an animation. Raises ValueError with the fault, also
    for pictures over Pillow's limit (179 megapixels).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()  # all of it: `verify` does not notice a truncated file
            with contextlib.suppress(Exception):  # damaged tags raise after the image is turned
                ImageOps.exif_transpose(image, in_place=True)
            image = _on_white(image, is_bmp=data.startswith(b"BM"))
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    except Image.UnidentifiedImageError:
        raise ValueError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as e:  # on hostile bytes, Pillow raises nearly every exception type
        raise ValueError(str(e) or type(e).__name__) from e


def _on_white(image, is_bmp):
    """A loaded image in RGB, its transparent parts white."""
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        # a 32-bit BMP without alpha leaves zeros in its place
        if image.getextrema()[3] != (0, 0) or not is_bmp:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy RGB, too
