"""Read a picture file, of any size and format, as the models expect it."""

import contextlib
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from cifar.errors import UserError, first_line

# The formats that count as pictures, and their suffixes in a folder. Of the others that Pillow opens, some are data
# (HDF5) or programs for an interpreter (PostScript for Ghostscript). TGA is last, as it has no signature.
FORMATS = {
    "PNG": ".png", "JPEG": ".jpg .jpeg .jpe .jfif .mpo", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "DIB": ".dib",
    "TIFF": ".tif .tiff", "PPM": ".ppm .pgm .pbm .pnm .pfm", "JPEG2000": ".jp2 .j2k .jpx", "AVIF": ".avif",
    "ICO": ".ico", "TGA": ".tga",
}  # fmt: skip
SUFFIXES = frozenset(" ".join(FORMATS.values()).split())

PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # bytes, decompressed; Pillow refuses pictures with more than 1 MiB of text


def read_image(path: Path, size: int) -> Tensor:
    """Return the middle square of a picture file, uint8 [3, size, size]; a UserError says why it cannot be read."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is a directory, a pipe or a device")  # a pipe might never answer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and of details that viewers ignore, too
            Image.init()
            known_formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF is new in Pillow 11.3
            with Image.open(path, formats=known_formats) as file:
                file.load()
                with contextlib.suppress(Exception):  # viewers ignore damaged EXIF data, too
                    ImageOps.exif_transpose(file, in_place=True)  # turns before it fails to write damaged data again
                image = _to_rgb(file)
        pixels = np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    except Exception as error:  # a damaged or hostile file can make a decoder raise anything
        raise UserError(f"{path} cannot be read as a picture: {first_line(error)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as a viewer shows it: deep gray scaled to bytes, where Pillow clips it; transparency on white."""
    if image.mode.startswith(("I", "F")):
        return _scale_to_bytes(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _scale_to_bytes(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit or floating-point gray to bytes; NaN is black.

    No such format says which values are black and white, so it is the first of these ranges that holds all pixels: 0 to
    1 of floating-point numbers, 0 to 255, and 0 to 65535 of 16-bit numbers; else from the darkest to the brightest.
    """
    values = np.asarray(image, np.float64)
    finite = values[np.isfinite(values)]
    low, high = finite.min(), finite.max()  # which fail if there is none
    if image.mode == "F":
        whites = [1, 255]
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # of these, Pillow reads 16 bits as 32
        whites = [255]
    else:
        whites = [255, 65535]
    if low >= 0 and high <= whites[-1]:
        low, high = 0, next(white for white in whites if high <= white)
    levels = np.interp(np.nan_to_num(values, nan=low), (low, high), (0, 255))
    levels[values == image.info.get("transparency")] = 255  # a PNG's, on white, too
    return Image.fromarray(np.rint(levels).astype(np.uint8))
