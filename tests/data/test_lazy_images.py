"""The headers of image files: size without decoding, and one reason for every kind of damage."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image
from support.image_files import COLORS, content, image

from kdistill.data.lazy_images import header_of, header_warnings_ignored, read_header

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
    assert header_of(encoded) == (40, 60, 0, len(encoded))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "I;16"])
def test_size_and_bytes_of_a_png(mode):
    encoded = content(Image.new(mode, (60, 40)), "PNG")
    assert header_of(encoded) == (40, 60, 1, len(encoded))


def test_the_byte_count_is_that_of_the_file():
    assert read_header(io.BytesIO(JPEG[:-100]), 12345) == (40, 60, 0, 12345)  # the pixels are not read


@pytest.mark.parametrize(
    "encoded,reason",
    [
        (b"", "^an empty file$"),
        (b"<html>not found</html>", "^neither a JPEG nor a PNG$"),
        (b"GIF89a" + bytes(20), "^neither a JPEG nor a PNG$"),
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
        assert header_of(encoded) == (40, 60, 0, len(encoded))


def test_changed_bytes_give_a_size_or_a_reason():
    random = np.random.default_rng(0)
    with header_warnings_ignored():
        for original in (JPEG, PNG):
            for _ in range(500):
                damaged = np.frombuffer(original, np.uint8).copy()
                damaged[random.integers(0, min(700, len(damaged)), 3)] = random.integers(0, 256, 3)
                try:
                    height, width, png, length = header_of(damaged[: random.integers(1, len(damaged))].tobytes())
                except ValueError as error:
                    assert str(error)
                else:
                    assert 0 < height * width <= 50_000_000 and png in (0, 1) and length > 0
