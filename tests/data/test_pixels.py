"""One scene written in every mode and format that files come in reads as the same pixels."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from fastres.data import pixels

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def read(image, format="PNG", **options):
    """What is seen of an image that was written and opened again: int [H, W, 3]."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    seen = pixels.upright_rgb(pixels.open_image(buffer.getvalue()))
    assert seen.mode == "RGB"
    return np.asarray(seen).astype(int)


def rgb(grey):
    return np.repeat(np.asarray(grey).astype(int)[:, :, None], 3, 2)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled(format):
    image = Image.fromarray(GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read(image, format), rgb(GREY))


def test_a_dark_16_bit_image_stays_dark():
    assert read(Image.fromarray(np.full((8, 8), 514, np.uint16))).max() == 2


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("scale", [1, 257, 1 / 255])
def test_samples_without_a_scale_of_their_own(dtype, scale):
    if dtype == np.int32 and scale < 1:
        pytest.skip("integers")
    samples = GREY.astype(np.float64)
    samples[0, :2] = 0, 255
    image = Image.fromarray((samples * scale).astype(dtype))
    np.testing.assert_allclose(read(image, "TIFF"), rgb(samples), atol=0.51)


def test_negative_huge_and_absent_samples_are_scaled_not_clipped():
    samples = np.linspace(-3, 7, 64, dtype=np.float32).reshape(8, 8)
    seen = read(Image.fromarray(samples), "TIFF")[:, :, 0].ravel()
    assert seen[0] == 0 and seen[-1] == 255 and (np.diff(seen) > 0).all()
    samples = np.arange(64, dtype=np.int32).reshape(8, 8) * 10_000_000
    assert len(np.unique(read(Image.fromarray(samples), "TIFF"))) == 64
    samples = GREY.astype(np.float32) / 255
    samples[3, 4] = np.nan
    np.testing.assert_array_equal(read(Image.fromarray(samples), "TIFF")[4:], rgb(GREY)[4:])
    assert (pixels.to_bytes(np.full((2, 2), np.inf), None) == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_undone(orientation, format):
    stored = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    image = Image.fromarray(np.ascontiguousarray(stored(COLOUR)))
    np.testing.assert_array_equal(read(image, format, exif=exif, **options), COLOUR)


def test_a_damaged_exif_block_costs_nothing():
    np.testing.assert_array_equal(read(Image.fromarray(COLOUR), exif=b"Exif\0\0MM\0*\0\0\xff\xff junk"), COLOUR)


def test_alpha_is_composed_over_the_background():
    alpha = RNG.integers(0, 256, (12, 20), dtype=np.uint8)
    ground = np.array(pixels.BACKGROUND)
    share = alpha[:, :, None] / 255
    seen = read(Image.merge("RGBA", [*Image.fromarray(COLOUR).split(), Image.fromarray(alpha)]))
    np.testing.assert_allclose(seen, COLOUR * share + ground * (1 - share), atol=1)
    seen = read(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)]))
    np.testing.assert_allclose(seen, rgb(GREY) * share + ground * (1 - share), atol=1)


@pytest.mark.parametrize("mode, value", [("P", 3), ("L", 77), ("RGB", (9, 8, 7)), ("1", 0)])
def test_a_transparent_colour_shows_the_background(mode, value):
    image = Image.new(mode, (8, 8), value)
    if mode == "P":
        image.putpalette([10, 20, 30] * 256)
    image.putpixel((0, 0), {"P": 4, "L": 5, "RGB": (1, 2, 3), "1": 1}[mode])
    seen = read(image, transparency=value)
    assert (seen[4, 4] == pixels.BACKGROUND).all()
    assert seen[0, 0].tolist() == {"P": [10, 20, 30], "L": [5] * 3, "RGB": [1, 2, 3], "1": [255] * 3}[mode]


def test_a_transparent_16_bit_value_shows_the_background():
    samples = GREY.astype(np.uint16) * 257
    samples[GREY == 7] = 0
    samples[2, 3] = 7 * 257
    seen = read(Image.fromarray(samples), transparency=7 * 257)
    assert (seen[2, 3] == pixels.BACKGROUND).all()
    others = GREY > 7
    others[2, 3] = False
    np.testing.assert_array_equal(seen[others], rgb(GREY)[others])


def test_palettes():
    image = Image.fromarray(GREY).convert("P")
    image.putpalette([channel for i in range(256) for channel in (i, 255 - i, i // 2)])
    expected = np.stack([GREY, 255 - GREY, GREY // 2], -1)
    for format in ("PNG", "TIFF", "BMP", "GIF"):
        np.testing.assert_array_equal(read(image, format), expected)


def test_cmyk_and_lab():
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    for format in ("TIFF", "JPEG"):
        seen = read(cmyk, format, **({"quality": 100, "subsampling": 0} if format == "JPEG" else {}))
        assert np.abs(seen - np.asarray(cmyk.convert("RGB"))).mean() < 2
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    smooth = Image.fromarray(np.full((8, 8, 3), (200, 100, 50), np.uint8))
    seen = read(ImageCms.applyTransform(smooth, to_lab), "TIFF")
    assert np.abs(seen - np.array((200, 100, 50))).max() <= 4


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_several(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if format == "WEBP" else {}
    seen = read(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (seen == (255, 0, 0)).all()


def test_no_suffix_of_what_is_no_image_or_runs_ghostscript():
    assert {".png", ".jpg", ".jfif", ".jpe", ".pgm", ".webp", ".tif", ".avif", ".mpo", ".ppm"} <= pixels.suffixes()
    assert not {".eps", ".ps", ".wmf", ".pdf", ".mpg", ".h5", ".txt"} & pixels.suffixes()
    with pytest.raises(Exception, match="cannot identify"):  # though its name may be .png
        pixels.open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")


def test_small_images_are_decoded_alike_at_the_first_look_and_later():
    buffer = io.BytesIO()
    Image.fromarray(COLOUR.repeat(10, 0).repeat(6, 1)).save(buffer, "JPEG")
    whole = np.asarray(pixels.upright_rgb(pixels.open_image(buffer.getvalue())))
    np.testing.assert_array_equal(pixels.cropped(whole, 24), pixels.square(pixels.open_image(buffer.getvalue()), 24))


def test_text_chunks_are_no_pixels():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 1000)
    np.testing.assert_array_equal(read(Image.fromarray(COLOUR), pnginfo=info), COLOUR)


@pytest.mark.parametrize("size", [10, 20, 60])
@pytest.mark.parametrize("share", [0.5, 0.875])
def test_a_share_of_the_center_is_what_a_crop_by_hand_shows(size, share):
    rows = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    side = round(40 * share)
    top, left = (40 - side) // 2, (60 - side) // 2
    by_hand = Image.fromarray(rows[top : top + side, left : left + side]).resize(
        (size, size), Image.Resampling.BILINEAR
    )
    np.testing.assert_array_equal(pixels.cropped(rows, size, share), np.asarray(by_hand))
    np.testing.assert_array_equal(pixels.square(Image.fromarray(rows), size, share), np.asarray(by_hand))


def test_a_jpeg_is_not_decoded_below_the_share_that_is_seen():
    file = io.BytesIO()
    Image.new("RGB", (1600, 1200)).save(file, "JPEG")
    for share, width in ((1.0, 400), (0.5, 800), (0.2, 1600)):
        image = pixels.open_image(file.getvalue())
        pixels.square(image, 300, share)
        assert image.width == width


def test_an_empty_page_from_a_scanner_is_read():
    buffer = io.BytesIO()
    Image.new("1", (2480, 3508), 1).save(
        buffer, "TIFF", compression="group4"
    )  # A4, 300 dots an inch, a few hundred bytes
    assert (pixels.square(pixels.open_image(buffer.getvalue()), 16) == 255).all()
