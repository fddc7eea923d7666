"""The test images on which student and teacher differ, as small PNG files of a run folder. NumPy alone."""

import struct
import zlib
from pathlib import Path

import numpy as np

from kdistill.files import whole
from kdistill.measure import log_softmax

SHOWN = 24  # images; enough to see a pattern, few enough for one look
LARGEST = 96  # pixels of a picture's longer side
FOLDER = "differences"


def differing(student_logits: np.ndarray, teacher_logits: np.ndarray, test, folder: Path) -> dict:
    """Writes the images on which the student is surest of another class than the teacher's to `folder/differences`.

    `test` holds uint8 images `[n, h, w, c]` and labels `[n]`. Returns `{"images", "count", "student_right",
    "teacher_right", "shown"}`: how many images there are, on how many the two differ, how many of those one of them
    has right, and of each picture its file, index in the test images, label, and class and confidence of both.
    """
    student, teacher = (np.exp(log_softmax(np.asarray(each))) for each in (student_logits, teacher_logits))
    named, taught = student.argmax(axis=1), teacher.argmax(axis=1)
    differ = np.flatnonzero(named != taught)
    surest = differ[np.argsort(-student.max(axis=1)[differ], kind="stable")][:SHOWN]
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    for old in place.glob("*.png"):  # of a run that has been gone on with since
        old.unlink()
    shown = []
    for i in surest.tolist():
        name = f"{FOLDER}/{i:06}.png"
        with whole(folder / name) as part:
            part.write_bytes(png(smaller(test.images[i])))
        found = {"file": name, "index": i, "label": int(test.labels[i])}
        found |= {"student": int(named[i]), "student_confidence": float(student[i, named[i]])}
        shown.append({**found, "teacher": int(taught[i]), "teacher_confidence": float(teacher[i, taught[i]])})
    return {
        "images": len(test.labels),
        "count": len(differ),
        "student_right": int((named == test.labels)[differ].sum()),
        "teacher_right": int((taught == test.labels)[differ].sum()),
        "shown": shown,
    }


def smaller(image: np.ndarray) -> np.ndarray:
    """A uint8 image `[h, w, c]` whose longer side is 96 pixels at most: means of square blocks, a rest cut off."""
    step = -(-max(image.shape[:2]) // LARGEST)
    height, width = (max(1, side // step) for side in image.shape[:2])
    image = image[: height * step, : width * step]
    blocks = image.reshape(height, image.shape[0] // height, width, image.shape[1] // width, -1)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    """A uint8 image `[h, w, c]` as PNG: grey for one channel, RGB for three, else the mean of the channels in grey."""
    if image.shape[2] not in (1, 3):
        image = np.rint(image.mean(axis=2, keepdims=True)).astype(np.uint8)
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)  # 0: no filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
