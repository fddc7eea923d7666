"""The images on which student and teacher disagree: in TensorBoard, and as pictures for the report."""

import io
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from kdistill.data.splits import Examples
from kdistill.evaluation.metrics import log_softmax
from kdistill.files import whole

LOOKED_AT = 2000  # validation images
SHOWN = 25


def write(
    student_logits: np.ndarray,
    teacher_logits: np.ndarray,
    examples: Examples,
    class_names: Sequence[str],
    folder: Path,
    step: int,
) -> int:
    """Writes the images where student and teacher differ to `folder`, in place of what was there; returns how many do.

    `student_logits`, `teacher_logits`: `[n, classes]`, for the n `examples`. Shown are those of which the teacher is
    most certain, with the true class and what each has named.
    """
    student, teacher = student_logits.argmax(axis=1), teacher_logits.argmax(axis=1)
    found = np.flatnonzero(student != teacher)
    certainty = tf.nn.softmax(tf.constant(teacher_logits, tf.float32)).numpy().max(axis=1)
    chosen = found[np.argsort(-certainty[found], kind="stable")][:SHOWN]
    shutil.rmtree(folder, ignore_errors=True)
    writer = tf.summary.create_file_writer(str(folder))
    text = f"Student and teacher name different classes for {len(found)} of {len(examples)} validation images."
    with writer.as_default(step=step):
        tf.summary.text("student_and_teacher_differ", text)
        if len(chosen):
            named = [(class_names[i] for i in (examples.labels[j], teacher[j], student[j])) for j in chosen]
            picture = grid(examples.images[chosen], [_title(*names) for names in named])
            tf.summary.image("student_and_teacher_differ", picture[None], description=text)
    writer.close()
    return len(found)


def _title(true: str, teacher: str, student: str) -> str:
    return "\n".join(f"{who} {name[:14]}" for who, name in (("is", true), ("teacher", teacher), ("student", student)))


def grid(images: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """One picture, uint8 `[height, width, 4]`, of uint8 images `[n, h, w, 1 or 3]`, five in a row, titles above."""
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.9 * rows), dpi=100, layout="constrained")
    for place, (image, title) in enumerate(zip(images, titles, strict=True), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=7)
        axes.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return tf.io.decode_png(content.getvalue(), channels=4).numpy()


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
    """A uint8 image `[h, w, c]` as PNG: gray for one channel, RGB for three, else the mean of the channels in gray."""
    if image.shape[2] not in (1, 3):
        image = np.rint(image.mean(axis=2, keepdims=True)).astype(np.uint8)
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)  # 0: no filter

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
