"""Headers without decoding, one reason for every damage; every orientation and format, compared with Pillow's."""

import hashlib
import io
import os
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.image_files import COLORS, content, image

from kdistill.data import lazy_images
from kdistill.data.batches import evaluation_batches, training_batches
from kdistill.data.image_files import (
    TURNED,
    center_crop_boxes,
    decoded_at_once,
    decoder_for,
    header_of,
    header_warnings_ignored,
    random_crop_boxes,
    read_header,
)
from kdistill.data.lazy_images import Damage, EncodedImages, Files
from kdistill.data.splits import Examples
from kdistill.errors import InputError
from kdistill.recipe import Data

JPEG, PNG = content(image(COLORS["red"], 40, 60)), content(image(COLORS["red"], 40, 60), "PNG")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims this size."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + PNG[24:29]
    return PNG[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + PNG[33:]


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"icc_profile": b"profile" * 20}, {"comment": b"x" * 999}]
)
def test_size_and_bytes_of_a_jpeg(options):
    encoded = content(image(COLORS["red"], 40, 60), **options)
    assert header_of(encoded) == (40, 60, 0, len(encoded), 1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "I;16"])
def test_size_and_bytes_of_a_png(mode):
    encoded = content(Image.new(mode, (60, 40)), "PNG")
    assert header_of(encoded) == (40, 60, 1, len(encoded), 1)


def test_the_byte_count_is_that_of_the_file():
    assert read_header(io.BytesIO(JPEG[:-100]), 12345) == (40, 60, 0, 12345, 1)  # the pixels are not read


@pytest.mark.parametrize(
    "encoded,reason",
    [
        (b"", "^an empty file$"),
        (b"<html>not found</html>", "^no JPEG, PNG, BMP, GIF, WebP, TIFF, AVIF file$"),
        (b"GIF", "^no JPEG, "),
        (b"GIF89a" + bytes(20), "^a GIF with a damaged header: "),
        (b"BM" + bytes(20), "^a BMP with a damaged header: "),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "^a WebP with a damaged header: "),
        (b"II*\0" + bytes(20), "^a TIFF with a damaged header: "),
        (b"\0\0\0\x20ftypavif" + bytes(20), "^a AVIF with a damaged header: "),
        (b"\0\0\0\x20ftypheic" + bytes(20), "^HEIC, which cannot be read; convert it to JPEG$"),
        (b"\0\0\0\x20ftypmif1" + bytes(20), "^HEIC, which cannot be read"),
        (JPEG[:100], "^a JPEG with a damaged header: "),
        (JPEG[:2], "^a JPEG with a damaged header: "),
        (JPEG[:2] + bytes(200), "^a JPEG with a damaged header: "),
        (PNG[:20], "^a PNG with a damaged header: "),
        (PNG[:16] + bytes(8) + PNG[24:], "^a PNG with a damaged header: "),
        (png_of_size(0, 40), "^a PNG with a damaged header: "),
        (png_of_size(10_000, 5_001), "^50 megapixels, the limit is 50$"),
        (png_of_size(10_000, 10_000), "^100 megapixels, the limit is 50$"),
        (png_of_size(2**31 - 1, 2**31 - 1), "^4611686014132 megapixels, the limit is 50$"),
    ],
)
def test_one_reason_for_every_damage(encoded, reason):
    """Warnings are errors in the tests, so Pillow's own about large images do not show either."""
    with pytest.raises(ValueError, match=reason):
        header_of(encoded)


def test_damaged_exif_data_is_no_damage_of_the_image():
    exif = Image.Exif()
    exif[0x010E] = "a description" * 20
    encoded = content(image(COLORS["red"], 40, 60), exif=exif.tobytes()[:60])
    with header_warnings_ignored():
        assert header_of(encoded) == (40, 60, 0, len(encoded), 1)


KINDS = ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]  # those that can have an orientation
STORED = {  # the turn from an upright image to the stored pixels, by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
LOSSLESS = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}


def smooth(height: int, width: int) -> Image.Image:
    """An image without symmetries, whose JPEG hardly differs from it."""
    small = np.random.default_rng(5).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def oriented(orientation: int, kind: str, picture: Image.Image | None = None) -> bytes:
    """A file that shows `picture` upright, with its pixels stored as a camera in this orientation stores them."""
    picture, exif = picture or smooth(40, 60), Image.Exif()
    exif[0x0112] = orientation
    tags = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif}
    stored = picture.transpose(STORED[orientation]) if orientation in STORED else picture
    return content(stored, kind, **({} if kind in ("GIF", "BMP") else tags), **LOSSLESS.get(kind, {}))


def images_of(folder, contents: list[bytes], side: int) -> EncodedImages:
    names = [f"{place:02}".encode() for place in range(len(contents))]
    for name, encoded in zip(names, contents, strict=True):
        (folder / name.decode()).write_bytes(encoded)
    headers = np.array([header_of(encoded) for encoded in contents])
    return EncodedImages(Files(folder, np.array(names), headers), side, Damage(len(names), 0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_orientation_is_upright_and_as_pillow_turns_it(tmp_path, kind):
    contents = [oriented(orientation, kind, smooth(32, 48)) for orientation in range(1, 9)]
    images = images_of(tmp_path, contents, side=28)
    assert images.store.headers[:, :2].tolist() == [[32, 48]] * 8
    for encoded, pixels in zip(contents, images[:], strict=True):
        turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"), int)
        tolerance = 12 if kind == "JPEG" else 0  # two decoders
        assert np.abs(pixels - turned[2:30, 10:38]).max() <= tolerance  # no resizing: 28 is 0.875 * 32
        assert np.abs(pixels.astype(int) - images[0]).max() <= (12 if kind in ("JPEG", "AVIF") else 0)


def test_large_photographs_are_reduced_and_turned(tmp_path):
    images = images_of(tmp_path, [oriented(number, "JPEG", smooth(896, 1200)) for number in range(1, 9)], side=96)
    assert (center_crop_boxes(images.store.headers, 96)[:, 4] % TURNED == 3).all()
    for pixels in images[:]:
        assert np.abs(pixels.astype(int) - images[0]).max() <= 6


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_random_parts_are_the_same_in_every_orientation(tmp_path, kind):
    images = images_of(tmp_path, [oriented(number, kind, smooth(41, 60)) for number in range(1, 9)], side=24)
    draws = np.tile(np.random.default_rng(1).random((5, 1, 4)), (1, 8, 1))
    for draw in draws:
        boxes = random_crop_boxes(images.store.headers, 24, draw, 0.25)
        decode = decoder_for(24, boxes)
        pixels = [decode(images.store.read(place), box).numpy().astype(int) for place, box in enumerate(boxes)]
        assert max(np.abs(other - pixels[0]).max() for other in pixels) <= (8 if kind == "JPEG" else 1)


@pytest.mark.slow
def test_training_sees_upright_images(tmp_path):
    """Red above blue, in files of four formats and eight orientations, centered and cropped at random."""
    picture = Image.new("RGB", (48, 48), (250, 0, 0))
    picture.paste((0, 0, 250), (0, 24, 48, 48))
    kinds = ("JPEG", "PNG", "WEBP", "TIFF")
    images = images_of(tmp_path, [oriented(n, kind, picture) for kind in kinds for n in range(1, 9)], side=16)
    examples = Examples(images, np.zeros(32, np.int32))
    for data in (Data(), Data(crop_area=0.9)):
        for pixels, _ in training_batches(examples, data, 8, seed=0, epoch=0):
            assert (pixels[:, 1, :, 0] > 200).numpy().all() and (pixels[:, -2, :, 2] > 200).numpy().all()
    (batch,) = (pixels for pixels, _, _ in evaluation_batches(examples, 32))
    np.testing.assert_array_equal(batch, images[:])


@pytest.mark.parametrize("value", [0, 9, 99, 65535])
def test_an_orientation_without_a_meaning_is_upright(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert header_of(content(smooth(40, 60), exif=exif))[4] == 1


def test_orientation_of_both_byte_orders_and_behind_other_data():
    for order in (b"MM\0*\0\0\0\x08", b"II*\0\x08\0\0\0"):
        name = "big" if order.startswith(b"MM") else "little"
        entry = b"".join(n.to_bytes(size, name) for n, size in ((1, 2), (0x0112, 2), (3, 2), (1, 4), (8, 2), (0, 6)))
        encoded = content(smooth(60, 40), exif=b"Exif\0\0" + order + entry, comment=b"x" * 500, icc_profile=b"p" * 99)
        assert header_of(encoded) == (40, 60, 0, len(encoded), 8)


def test_the_fingerprint_depends_on_the_orientation_only_where_there_is_one(tmp_path):
    images = images_of(tmp_path, [content(smooth(40, 60), quality=90)], side=16)
    before = images.fingerprint()
    assert images.store.headers[0, 2:].tolist() == [0, len(images.store.read(0)), 1]
    images.store.headers[0, 4] = 2  # same size
    assert images.fingerprint() != before
    upright = hashlib.sha256(repr((1, 16)).encode())  # as it was before orientations were read
    upright.update(images.store.names.tobytes() + images.store.headers[:, :4].tobytes())
    assert upright.digest() == before


@pytest.mark.parametrize(
    "kind,mode",
    [("GIF", "P"), ("GIF", "L"), ("BMP", "RGB"), ("BMP", "1"), ("BMP", "P"), ("WEBP", "RGBA")]
    + [("TIFF", mode) for mode in ("RGB", "RGBA", "L", "1", "P", "CMYK", "I;16")]
    + [("AVIF", "RGB"), ("AVIF", "RGBA")],
)
def test_formats_that_pillow_decodes(tmp_path, kind, mode):
    gray = Image.fromarray(np.tile(np.arange(0, 192, 4, np.uint8)[:, None], (1, 48)))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(gray).astype(np.uint16) * 256 + 77)
    else:
        others = {"1": gray.convert("1", dither=Image.Dither.NONE), "P": gray.convert("RGB").quantize()}
        picture = others.get(mode) or gray.convert("RGB").convert(mode)
    encoded = content(picture, kind, **LOSSLESS.get(kind, {}))
    assert header_of(encoded) == (48, 48, 2, len(encoded), 1)
    expected = np.where(np.asarray(gray) >= 128, 255, 0) if mode == "1" else np.asarray(gray, int)
    pixels = images_of(tmp_path, [encoded], side=42)[0]
    assert np.abs(pixels - expected[3:45, 3:45, None]).max() <= (3 if kind == "AVIF" else 1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "AVIF"])
def test_the_first_image_of_several(tmp_path, kind):
    frames = [image(color, 40, 60, noise=0) for color in COLORS.values()]
    encoded = content(frames[0], kind, save_all=True, append_images=frames[1:], **LOSSLESS.get(kind, {}))
    assert np.abs(images_of(tmp_path, [encoded], side=16)[0] - np.array(COLORS["blue"])).max() <= 4


def test_pixels_of_32_bits_are_refused():
    for mode, value in (("F", 0.5), ("I", 70_000)):
        with pytest.raises(ValueError, match=f"pixels of the type {mode}; expected 8 or 16 bits"):
            header_of(content(Image.new(mode, (8, 8), value), "TIFF"))


@pytest.mark.parametrize("kind", [*KINDS, "GIF", "BMP"])
def test_changed_bytes_give_a_header_or_a_reason(tmp_path, kind):
    random, original = np.random.default_rng(0), oriented(6, kind)
    with header_warnings_ignored():
        for _ in range(300):
            damaged = np.frombuffer(original, np.uint8).copy()
            damaged[random.integers(0, min(700, len(damaged)), 3)] = random.integers(0, 256, 3)
            try:
                height, width, number, length, orientation = header_of(damaged[: random.integers(1, 9999)].tobytes())
            except ValueError as error:
                assert str(error)
            else:
                assert 0 < height * width <= 50_000_000 and number in (0, 1, 2) and length > 0
                assert 1 <= orientation <= 8


@pytest.mark.parametrize("kind", [*KINDS, "GIF", "BMP"])
def test_a_file_that_ends_early_is_one_reason(tmp_path, kind):
    encoded = oriented(6, kind, image(COLORS["red"], 90, 120))
    images = images_of(tmp_path, [encoded], side=16)
    (tmp_path / "00").write_bytes(encoded[: len(encoded) // 2])
    with pytest.raises(InputError, match=r"The image '00' cannot be decoded: .+\. Fix or remove it\.$") as raised:
        images[0]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size,most", [((7000, 7000), 3), ((4000, 3000), 12), ((12_500, 12_000), 1), ((640, 480), 16)])
def test_the_pixels_that_are_decoded_at_once_are_limited(tmp_path, monkeypatch, size, most):
    """150 megapixels: 3 images of 49, 12 of 12, one that is larger than all; small ones by all sixteen threads."""
    headers = np.array([[size[1], size[0], 1, 100, 1], [10, 10, 1, 100, 1]] * 20, np.int64)
    assert decoded_at_once(headers, 16) == most and decoded_at_once(headers, 2) == min(2, most)
    assert decoded_at_once(headers[:0], 16) == 16
    running, peak, lock = [0], [0], threading.Lock()

    def decode(content, box):
        with lock:
            running[0] += 1
            peak[0] = max(peak[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(lazy_images, "_eager_decoder", lambda side, boxes: decode)
    (tmp_path / "a.png").write_bytes(PNG)
    images = EncodedImages(Files(tmp_path, np.array([b"a.png"] * 40), headers), 8, Damage(40, 0))
    assert images[:].shape == (40, 8, 8, 3) and peak[0] <= most and peak[0] >= min(2, most)
