"""The bytes of one image file -> upright RGB pixels."""
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
    grey to 8 bits, takes the first frame of an animation. Raises ValueError with the fault.
    """
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            W, H = image.size
            if W * H > MAX_PIXELS:
                raise ValueError(f"{W}x{H} pixels are over the limit of {MAX_PIXELS:,}")
            image.load()  # all of it: `verify` does not notice a truncated file
            try:  # not ImageOps.exif_transpose, which fails if it cannot write other tags back
                orientation = image.getexif().get(ORIENTATION)
            except Exception:  # damaged EXIF is none
                orientation = None
            image = _on_white(image, data)
            if orientation in UPRIGHT:
                image = image.transpose(UPRIGHT[orientation])
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    except Image.UnidentifiedImageError:
        raise ValueError(f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except Exception as e:  # on hostile bytes, Pillow raises nearly every exception type
        raise ValueError(str(e) or type(e).__name__) from e


def _on_white(image, data):
    """A loaded image in RGB, its transparent parts white."""
    key = image.info.get("transparency")  # of a PNG without alpha: the one transparent colour
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image)
        image = np.where(grey == key, 255, (grey >> 8).clip(0, 255)).astype(np.uint8)
        image = Image.fromarray(image)
    elif image.format == "PNG" and image.mode == "L" and key is not None:
        image.info["transparency"] = key * 255 // (2 ** data[24] - 1)  # as the pixels were scaled
    if image.has_transparency_data:
        image = image.convert("RGBA")
        # a 32-bit BMP without alpha leaves zeros in its place
        if image.getextrema()[3] != (0, 0) or not data.startswith(b"BM"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy RGB, too
