"""One image file: its header, which Pillow reads, and its pixels, cropped, resized and upright.

TensorFlow decodes JPEG and PNG, Pillow the other formats, all as operations of TensorFlow, so that an image is the same
here and inside `tf.data`; TensorFlow is imported when the first image is decoded. Cameras do not turn the pixels but
write an EXIF orientation: it is applied, and sizes and crops are those of the upright image. (Of a PNG only if its eXIf
chunk is before the pixels, where encoders put it: looking behind them would read the whole file.)
"""

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

# The first bytes of a file, "." for any byte; the name of the format; the class of Pillow that reads it.
FORMATS = [
    (re.compile(start, re.DOTALL), name, image_file)
    for start, name, image_file in (
        (rb"\xff\xd8", "JPEG", JpegImageFile),
        (rb"\x89PNG\r\n\x1a\n", "PNG", PngImageFile),
        (rb"BM", "BMP", BmpImageFile),
        (rb"GIF8[79]a", "GIF", GifImageFile),
        (rb"RIFF....WEBP", "WebP", WebPImageFile),
        (rb"II[*+]\x00|MM\x00[*+]", "TIFF", TiffImageFile),
        (rb"....ftypavi[fs]", "AVIF", AvifImageFile),
        (rb"....ftyp(hei[cxms]|hev[cmxs]|mif1|msf1)", "HEIC", None),
    )
]
NUMBERS = {JpegImageFile: 0, PngImageFile: 1}  # of the formats in a header; 2 for the others
CENTER = 0.875  # evaluation sees the center square, 224 of 256 of the shorter side: the custom of ImageNet
MAX_MEGAPIXELS = 50  # larger images are not decoded
MEGAPIXELS_AT_ONCE = 150  # decoded by all threads: 1 GB, with the copies that cropping and converting makes
# The way of decoding: a JPEG reduced by 2 to the power 0, 1, 2 or 3, a PNG, or a format that Pillow decodes; plus
# TURNED times the turn that makes the image upright.
PNG, OTHER, TURNED = 4, 5, 8
TRANSPOSED, UPSIDE_DOWN, MIRRORED = 1, 2, 4  # a turn is their sum, applied in this order
TURNS = np.array([0, 0, 4, 6, 2, 1, 5, 7, 3])  # by EXIF orientation: 1 is upright, 6 a quarter turn to the right
HEADER = 5  # numbers in a header


def read_header(file: BinaryIO, length: int) -> tuple[int, int, int, int, int]:
    """The header of an image file of `length` bytes, as in `Store`; no pixel is decoded.

    Call it inside `header_warnings_ignored`. Raises `ValueError` with the reason why the image cannot be used.
    """
    with _opened(file) as image:
        number, (width, height) = NUMBERS.get(type(image), 2), image.size
        if number == 2 and image.mode in ("I", "F", "LAB"):
            raise ValueError(f"pixels of the type {image.mode}; expected 8 or 16 bits for each color")
        # Pillow turns a TIFF itself: its orientation is a tag of the image, not EXIF data.
        orientation = _orientation(image) if "exif" in image.info and not isinstance(image, TiffImageFile) else 1
    if orientation >= 5:
        height, width = width, height
    return height, width, number, length, orientation


def _opened(file: BinaryIO) -> Image.Image:
    """The image of a file, without its pixels. Raises `ValueError` with the reason why it cannot be used."""
    start = file.read(16)
    if not start:
        raise ValueError("an empty file")
    name, image_file = next(((name, kind) for pattern, name, kind in FORMATS if pattern.match(start)), ("", None))
    if not name:
        raise ValueError(f"no {', '.join(name for _, name, image_file in FORMATS if image_file)} file")
    if image_file is None:
        raise ValueError(f"{name}, which cannot be read; convert it to JPEG")
    file.seek(0)
    try:
        # Pillow's classes, not `Image.open`, which warns or raises for many pixels before the limit is checked here.
        image = image_file(file)
    except Image.DecompressionBombError:  # of WebP, whose decoder allocates all pixels
        raise ValueError(f"too many pixels, the limit is {MAX_MEGAPIXELS} megapixels") from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        if getattr(error, "errno", None):  # of the file system, not of the content
            raise
        raise ValueError(f"a {name} with a damaged header: {reason_of(error)}") from None
    pixels = image.width * image.height
    if pixels > MAX_MEGAPIXELS * 1_000_000:
        image.close()
        raise ValueError(f"{pixels / 1e6:.0f} megapixels, the limit is {MAX_MEGAPIXELS}")
    return image


def _orientation(image: Image.Image) -> int:
    """The orientation in the EXIF data, 1 (upright) to 8; 1 if there is none, or a number without a meaning."""
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        orientation = exif.get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data: many types; the pixels can be whole
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def decoded_at_once(headers: np.ndarray, threads: int) -> int:
    """How many images with these headers, `[n, 5]`, may be decoded at a time by at most so many threads."""
    pixels = int((headers[:, 0] * headers[:, 1]).max(initial=1))
    return max(1, min(threads, MEGAPIXELS_AT_ONCE * 1_000_000 // pixels))


def header_of(content: bytes) -> tuple[int, int, int, int, int]:
    """As `read_header`, of an image in memory."""
    return read_header(io.BytesIO(content), len(content))


@contextlib.contextmanager
def header_warnings_ignored() -> Iterator[None]:
    """Hides what Pillow warns of in headers, such as damaged EXIF data, which decoding does not need.

    Enter it once around a scan, not in its threads: Python's warning filters belong to the process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def reason_of(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return text.replace("{{function_node", "\n").splitlines()[0].strip()[:100] or "damaged"


def center_crop_boxes(headers: np.ndarray, side: int) -> np.ndarray:
    """The center square of every image: int32 `[n, 5]`, top, left, height, width and the way of decoding.

    Boxes are those of the stored pixels, before they are turned upright.
    """
    height, width = headers[:, 0], headers[:, 1]
    edge = np.maximum(1, np.round(np.minimum(height, width) * CENTER)).astype(np.int64)
    return _boxes((height - edge) // 2, (width - edge) // 2, edge, edge, headers, side)


def random_crop_boxes(headers: np.ndarray, side: int, draws: np.ndarray, min_area: float) -> np.ndarray:
    """Random parts, `min_area` to 1 of the area and 3:4 to 4:3 in shape (Szegedy et al. 2014, arXiv 1409.4842).

    `draws`: float64 `[n, 4]` in [0, 1). Returns boxes as `center_crop_boxes` does.
    """
    height, width = headers[:, 0], headers[:, 1]
    area = height * width * (min_area + (1 - min_area) * draws[:, 0])
    ratio = np.exp(np.log(3 / 4) + draws[:, 1] * (np.log(4 / 3) - np.log(3 / 4)))
    tall = np.clip(np.round(np.sqrt(area / ratio)), 1, height).astype(np.int64)
    wide = np.clip(np.round(np.sqrt(area * ratio)), 1, width).astype(np.int64)
    top = (draws[:, 2] * (height - tall + 1)).astype(np.int64)
    left = (draws[:, 3] * (width - wide + 1)).astype(np.int64)
    return _boxes(top, left, tall, wide, headers, side)


def _boxes(top, left, height, width, headers: np.ndarray, side: int) -> np.ndarray:
    # A large JPEG is reduced by 2, 4 or 8 while it is decoded, which is faster and averages, if enough pixels remain.
    halvings = np.floor(np.log2(np.maximum(1, np.minimum(height, width) / side)))
    way = np.choose(headers[:, 2], [np.minimum(3, halvings), PNG, OTHER])
    boxes, turn = np.stack([top, left, height, width, way], 1).astype(np.int32), TURNS[headers[:, 4]]
    if turn.any():  # from the upright image back to the stored pixels
        boxes[:, 0] = np.where(turn & UPSIDE_DOWN, headers[:, 0] - top - height, boxes[:, 0])
        boxes[:, 1] = np.where(turn & MIRRORED, headers[:, 1] - left - width, boxes[:, 1])
        transposed = (turn & TRANSPOSED) != 0
        boxes[transposed, :4] = boxes[transposed][:, [1, 0, 3, 2]]
        boxes[:, 4] += TURNED * turn.astype(np.int32)
    return boxes


def decode_image(content, box, side: int, way: int | None = None, turned: bool = True, others: bool = True):
    """uint8 `[side, side, 3]` of an encoded image: grayscale becomes gray, CMYK is converted, transparency dropped.

    `way`: the way of decoding, if it is the same for all images; None: the last number of `box`, and `turned` and
    `others` state whether some images are turned, or of a format that Pillow decodes.
    """
    import tensorflow as tf

    window = box[:4]

    def decode_full():
        return tf.io.decode_and_crop_jpeg(content, window, channels=3)

    def decode_reduced(ratio: int):
        image = tf.io.decode_jpeg(content, channels=3, ratio=ratio)
        top, left, height, width = tf.unstack(window // ratio)
        return image[top : top + height, left : left + width]

    def cropped(image):
        top, left, height, width = tf.unstack(window)
        return image[top : top + height, left : left + width]

    def decode_png():
        return cropped(tf.io.decode_png(content, channels=3))

    def decode_other():
        return cropped(tf.ensure_shape(tf.numpy_function(_pixels, [content], tf.uint8), (None, None, 3)))

    ways = [decode_full, *(functools.partial(decode_reduced, ratio) for ratio in (2, 4, 8)), decode_png, decode_other]
    if way is None:
        image = tf.switch_case(box[4] % TURNED if turned else box[4], ways if others else ways[:OTHER])
    else:
        image = ways[way % TURNED]()
    # The kernel of tf.image.resize, without its checks of the shape, which take time for every image.
    image = tf.raw_ops.ResizeBilinear(images=image[None], size=(side, side), half_pixel_centers=True)[0]
    image = tf.cast(tf.round(image), tf.uint8)
    if way is not None:
        return _upright(image, way // TURNED)
    turns = [functools.partial(_upright, image, turn) for turn in range(8)]
    return tf.switch_case(box[4] // TURNED, turns) if turned else image


def _upright(image, turn: int):
    """A square image `[side, side, 3]` after a turn, which is a sum of TRANSPOSED, UPSIDE_DOWN and MIRRORED."""
    import tensorflow as tf

    image = tf.transpose(image, (1, 0, 2)) if turn & TRANSPOSED else image
    axes = [axis for axis, flag in enumerate((UPSIDE_DOWN, MIRRORED)) if turn & flag]
    return tf.reverse(image, axes) if axes else tf.identity(image)


def _pixels(content: bytes) -> np.ndarray:
    """The stored pixels, uint8 `[height, width, 3]`, of the first image in a file, decoded by Pillow."""
    with _opened(io.BytesIO(content)) as image:
        image.load()
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        return np.asarray(image.convert("RGB"))


def decoder_for(side: int, boxes: np.ndarray):
    """`decode_image` as a graph for these boxes, (content, box) -> uint8 `[side, side, 3]`.

    The graph has only the operations that the boxes need: upright images are not slowed down by others.
    """
    ways = np.unique(boxes[:, 4])
    if len(ways) == 1:
        return _traced_decoder(side, int(ways[0]), False, False)
    return _traced_decoder(side, None, bool((ways >= TURNED).any()), bool((ways % TURNED == OTHER).any()))


@functools.lru_cache(maxsize=32)
def _traced_decoder(side: int, way: int | None, turned: bool, others: bool):
    """Traced once and not every epoch."""
    import tensorflow as tf

    with tf.device("CPU"):
        traced = tf.function(lambda *pair: decode_image(*pair, side, way, turned, others), autograph=False)
        return traced.get_concrete_function(tf.TensorSpec([], tf.string), tf.TensorSpec([5], tf.int32))
