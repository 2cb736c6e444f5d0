"""Pixels of one image file: any mode that Pillow decodes becomes upright RGB uint8, scaled and never clipped."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import ExifTags, Image, ImageCms

BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
# PostScript would run Ghostscript on the file; of the others Pillow knows the header and cannot decode the pixels.
NOT_DECODED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
SMALL = 128 * 128  # pixels of an image that is always decoded whole
MOST = 2**27  # pixels of an image: no camera's has more
HARMLESS, MOST_PACKED = (
    2**25,
    100,
)  # a larger image that decodes to more bytes for one of the file is neither photo nor scan
UPRIGHT = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations in which width and height change places
COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, the common ones first; HEIC where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    with_suffix = set(Image.registered_extensions().values())
    return (*COMMON, *sorted(set(Image.OPEN) & with_suffix - set(COMMON) - NOT_DECODED))


@functools.cache
def suffixes() -> frozenset[str]:
    """The endings, in lower case, of the files that are taken for images: every one that Pillow reads."""
    known: Mapping[str, str] = Image.registered_extensions()
    readable = {*formats(), "MPO"}  # several JPEGs in one file: Pillow opens it as JPEG
    return frozenset(suffix for suffix, name in known.items() if name in readable)


def open_image(raw: bytes) -> Image.Image:
    """The image of a file's bytes, its pixels not decoded yet; of an animation the first frame.

    Raises:
        Exception: of many types, where Pillow cannot read it.
    """
    if not raw:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(raw), formats=formats())
    pixels = image.width * image.height
    if pixels > MOST or (pixels > HARMLESS and 3 * pixels > MOST_PACKED * len(raw)):
        raise ValueError(f"{image.width} x {image.height} pixels in {len(raw)} bytes are too many to decode")
    return image


def square(image: Image.Image, size: int, share: float = 1.0) -> np.ndarray:
    """The central square of an image, uint8 [size, size, 3]: RGB, bilinear with antialiasing.

    Args:
        share: of the image's shorter side, which the square has.

    Raises:
        Exception: of many types, where the pixels cannot be decoded.
    """
    if image.width * image.height > SMALL:
        least = math.ceil(size / share)
        image.draft("RGB", (least, least))  # a JPEG decodes at a fraction of its size, not below this one
    return cropped(upright_rgb(image), size, share)


def resized_crop(
    image: Image.Image, size: tuple[int, int], pick: Callable[[int, int], tuple[int, int, int, int]]
) -> Image.Image:
    """A part of an image, RGB, of ``size`` (height, width): bilinear with antialiasing.

    A JPEG of which more is there than is seen is decoded at a fraction of its size.

    Args:
        pick: of the width and height of the upright image left, top, width and height of the part.

    Raises:
        Exception: of many types, where the pixels cannot be decoded.
    """
    if image.format in ("JPEG", "MPO"):  # the others' orientation may stand behind their pixels
        sideways = orientation(image) in SIDEWAYS
        width, height = image.size[::-1] if sideways else image.size
        box = pick(width, height)
        if width * height > SMALL:
            least = math.ceil(width * size[1] / box[2]), math.ceil(height * size[0] / box[3])
            image.draft("RGB", least[::-1] if sideways else least)
        image = upright_rgb(image)
    else:
        image = upright_rgb(image)
        width, height = image.size
        box = pick(width, height)
    across, down = image.width / width, image.height / height
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    part = left * across, top * down, min(right * across, image.width), min(bottom * down, image.height)
    return image.resize(size[::-1], Image.Resampling.BILINEAR, box=part)


def cropped(image: Image.Image | np.ndarray, size: int, share: float = 1.0) -> np.ndarray:
    """`square` of an RGB image or uint8 [H, W, 3]."""
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, 3) and share == 1:
            return image
        image = Image.fromarray(image)
    if image.size != (size, size) or share != 1:
        side = max(1, round(share * min(image.size)))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as it is meant to be seen, mode RGB: turned as EXIF says, deep samples scaled, alpha over `BACKGROUND`.

    16-bit samples are divided by 257. 32-bit and float samples have no scale of their own: see `to_bytes`.
    """
    image.load()
    image = turned(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return deep(image)
    if image.mode == "LAB":
        return lab(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return flattened(image)
    return image.convert("RGB")


def turned(image: Image.Image) -> Image.Image:
    """An image turned and mirrored as its EXIF orientation says; a damaged EXIF block says nothing."""
    found = orientation(image)
    return image.transpose(UPRIGHT[found]) if found in UPRIGHT else image


def orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1, upright, where there is none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's reader raises many types
        return 1


def flattened(image: Image.Image) -> Image.Image:
    """An image with alpha, or with a transparent colour, composed over `BACKGROUND`."""
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
    return Image.alpha_composite(ground, layer).convert("RGB")


def lab(image: Image.Image) -> Image.Image:
    """CIELAB as sRGB, which Pillow's own conversion leaves out."""
    lab_profile, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab_profile, srgb, "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is not done in place
    return converted


def deep(image: Image.Image) -> Image.Image:
    """A grey image of 16-bit, 32-bit or float samples as RGB."""
    samples = np.asarray(image)
    bits = dict(getattr(image, "tag_v2", {})).get(258, (16,))
    grey = to_bytes(samples, 4095 if bits == (12,) else 65535 if image.mode.startswith("I;16") else None)
    seen = np.repeat(grey[:, :, None], 3, 2)
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # PNG's one transparent value
        seen[samples == clear] = BACKGROUND
    return Image.fromarray(seen)


def to_bytes(samples: np.ndarray, top: int | None) -> np.ndarray:
    """Samples [H, W] on the scale 0..255, rounded to uint8.

    Args:
        samples: integers or floats; one that is not finite counts as the least.
        top: the sample that is white; None: the least of 1 (floats only), 255 and 65535 that none exceeds. Where
            samples are negative or larger still, the image's own least is black and its largest white.
    """
    values = samples.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[finite].min()), float(values[finite].max())
    values = np.where(finite, values, low)
    scales = (top,) if top else (1, 255, 65535) if samples.dtype.kind == "f" else (255, 65535)
    white = next((float(scale) for scale in scales if high <= scale), 0.0) if low >= 0 else 0.0
    if not white:
        values, white = values - low, high - low or 1.0
    return np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8)
