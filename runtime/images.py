"""Image files, PIL images and numpy arrays -> upright RGB images. Every failure is an `ImageError`."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Pillow can open many more, some of them through external programs: a line crop comes in one of these.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")

GLOB_CHARACTERS = frozenset("*?[")

# No letter fits into less than MIN_SIDE pixels. Beyond MAX_SIDE it is not the crop of one text line, which
# the model would squeeze into a few hundred pixels; and a small file can ask for a lot of memory.
MIN_SIDE = 4
MAX_SIDE = 16384
MAX_PIXELS = 64 * 1024 * 1024

# Where an image that is no file can say that it has to be turned, or which colour is transparent.
METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp", "transparency"}

TIFF_PHOTOMETRIC = 262
TIFF_WHITE_IS_ZERO = 0

ImageSource = str | Path | Image.Image | np.ndarray


class ImageError(ValueError):
    """An image that cannot be used. The message names the image, what is wrong with it, and the remedy."""


def find_images(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The image files that the arguments name, in their order; a file named twice comes twice.

    A folder stands for the images in it (not in folders below), a glob for the files that it matches, both
    sorted. Anything else stands for itself: whether it can be read turns out later.

    Returns:
        The files; and the arguments that name none, each with its error.
    """
    images: list[str] = []
    errors: dict[str, str] = {}
    for argument in arguments:
        if os.path.isdir(argument):
            found = sorted(
                str(child) for child in Path(argument).iterdir() if child.suffix.lower() in SUFFIXES
            )
            if not found:
                errors[argument] = (
                    f"{argument}: no images in this folder; put {', '.join(SUFFIXES)} files there"
                )
        elif GLOB_CHARACTERS & set(argument) and not os.path.lexists(argument):
            found = sorted(name for name in glob.glob(argument, recursive=True) if os.path.isfile(name))
            if not found:
                errors[argument] = f"{argument}: matches no file; check the pattern"
        else:
            found = [argument]
        images += found
    return images, errors


def load_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Open an image and bring it into the form the model was trained on: 8-bit RGB, upright, on white.

    Args:
        source: a JPEG, PNG, TIFF (first page) or WebP (first frame) file; a PIL image; or a uint8 array
            [H, W], [H, W, 1] (grey), [H, W, 3] (RGB) or [H, W, 4] (RGBA).
        name: what to call it in errors; the path by default.

    Raises:
        ImageError: missing, unreadable, truncated, of another format, or of a size or type that cannot be
            used.
    """
    if isinstance(source, str | Path):
        return _load_file(Path(source), name or str(source))
    name = name or "image"
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source, name), name)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    raise ImageError(f"{name}: of type {type(source).__name__}; give a path, a PIL image or a numpy array")


def load_pixels(source: ImageSource, name: str | None = None) -> np.ndarray:
    """As `load_image`, but uint8 [H, W, 3]; an array of that kind is returned as it is.

    Raises:
        ImageError: see `load_image`.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,):
        _check_size(source.shape[1], source.shape[0], name or "image")
        return source
    return np.asarray(load_image(source, name))


def _load_file(path: Path, name: str) -> Image.Image:
    try:
        # Opened here: a file that Pillow opens by its name it may map into memory, and then it scrambles the
        # rows of a grey TIFF that is stored lying on its side (Pillow 13.0.0).
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            return _decode(image, name)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: a folder; give the images in it") from None
    except Image.UnidentifiedImageError:
        what = "an empty file" if path.stat().st_size == 0 else "not a readable JPEG, PNG, TIFF or WebP image"
        raise ImageError(f"{name}: {what}; convert it, or leave it out") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; cut it into text lines") from None
    except Exception as error:  # Pillow's readers raise whatever a malformed header makes them stumble on
        raise ImageError(f"{name}: cannot be read ({error}); save it again") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.width, image.height, name)
    try:
        # What `crop` and `convert` make. For a small image all that follows takes longer than reading it.
        if type(image) is Image.Image and image.mode == "RGB" and not METADATA & image.info.keys():
            return image
        # Both are lost in the first conversion.
        white_is_zero = getattr(image, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = _to_8_bit(image, white_is_zero, name)
        return _to_rgb(image, name)
    except ImageError:
        raise
    except Exception as error:  # as above: a truncated or malformed body
        raise ImageError(f"{name}: cannot be decoded ({error}); save it again") from error


def _check_size(width: int, height: int, name: str) -> None:
    size = f"{width}x{height} pixels"
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name}: {size}; a text line has at least {MIN_SIDE} each way")
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name}: {size}; a side may have {MAX_SIDE:,}; cut it into shorter lines or scale it down"
        )
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {size}, more than {MAX_PIXELS:,} in all; cut it into text lines")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image, white_is_zero: bool, name: str) -> Image.Image:
    """Scale 16-bit grey, which Pillow's `convert` clips at 255, to 8 bits."""
    values = np.asarray(image, dtype=np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(
            f"{name}: grey values {values.min()} to {values.max()}; save it with 8 or 16 bits a channel"
        )
    if white_is_zero:  # Pillow inverts such TIFFs itself only at 8 bits and below
        values = 0xFFFF - values
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            f"{name}: an array of shape {list(array.shape)} and type {array.dtype}; "
            "give uint8 [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA)"
        )
    _check_size(array.shape[1], array.shape[0], name)  # Pillow fails on an empty array
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)
