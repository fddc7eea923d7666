"""The images for which student and teacher predict different classes: in TensorBoard, and as PNG files for the report.

TensorBoard shows where the teacher is surest (what the student has not learned), on validation images. The report shows
where the student is surest (what it would do in use), on test images.
"""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kdistill.data.splits import Examples
from kdistill.evaluation.metrics import log_softmax
from kdistill.files import atomic_file

TENSORBOARD_IMAGES = 2000  # validation images that are compared for TensorBoard
TENSORBOARD_PICTURES = 25
REPORT_PICTURES = 24  # enough to see a pattern, few enough for one look
MAX_SIDE = 96  # pixels of a report's picture
CELL, LINE, GAP = 112, 15, 12  # pixels in TensorBoard's: the longest side of an image, a line of its title, space
FOLDER = "differences"


def _differing(logits: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The rows for which both predict different classes, first those with the most confident `logits`."""
    rows = np.flatnonzero(logits.argmax(axis=1) != other.argmax(axis=1))
    confidence = log_softmax(logits[rows]).max(axis=1, initial=-np.inf)
    return rows[np.argsort(-confidence, kind="stable")]


def write_tensorboard(
    student_logits: np.ndarray,
    teacher_logits: np.ndarray,
    examples: Examples,
    class_names: Sequence[str],
    folder: Path,
    step: int,
) -> int:
    """Replaces the TensorBoard log in `folder` by the differing images, the teacher's most confident first.

    `student_logits`, `teacher_logits`: `[n, classes]`, for the n `examples`. Each picture has the label and both
    predicted classes above it. Returns the number of differing images.
    """
    import tensorflow as tf

    rows = _differing(teacher_logits, student_logits)
    shutil.rmtree(folder, ignore_errors=True)
    writer = tf.summary.create_file_writer(str(folder))
    text = f"Student and teacher predict different classes for {len(rows)} of {len(examples)} validation images."
    with writer.as_default(step=step):
        tf.summary.text("student_and_teacher_differ", text)
        if chosen := rows[:TENSORBOARD_PICTURES].tolist():
            classes = [examples.labels[chosen], teacher_logits[chosen].argmax(1), student_logits[chosen].argmax(1)]
            titles = [_title(*(class_names[i] for i in row)) for row in zip(*classes, strict=True)]
            picture = grid(examples.images[chosen], titles)
            tf.summary.image("student_and_teacher_differ", picture[None], description=text)
    writer.close()
    return len(rows)


def _title(label: str, teacher: str, student: str) -> str:
    parts = (("label", label), ("teacher", teacher), ("student", student))
    return "\n".join(f"{source} {name[:14]}" for source, name in parts)


def grid(images: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """One picture, uint8 `[height, width, 3]`, of uint8 images `[n, h, w, 1 or 3]`, five in a row, titles above."""
    font, columns = ImageFont.load_default(LINE - 4), min(5, len(images))
    factor = max(1, round(CELL / max(images.shape[1:3])))
    height, width = (side * factor for side in images.shape[1:3])
    above = LINE * max(title.count("\n") + 1 for title in titles)
    wide, high = max(width, CELL) + GAP, above + height + GAP
    picture = Image.new("RGB", (wide * columns, high * -(-len(images) // columns)), "white")
    draw = ImageDraw.Draw(picture)
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = place % columns * wide, place // columns * high
        draw.multiline_text((left + GAP // 2, top), title, "black", font, spacing=2)
        pixels = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)  # enlarged without mixing pixels
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        picture.paste(Image.fromarray(np.ascontiguousarray(pixels)), (left + GAP // 2, top + above))
    return np.asarray(picture)


def write_pictures(student_logits: np.ndarray, teacher_logits: np.ndarray, test: Examples, folder: Path) -> dict:
    """Writes differing images to `folder/differences`, the student's most confident first.

    `test` holds uint8 images `[n, h, w, c]` and labels `[n]`. Returns what `report.json` holds: `images`, `count` (of
    differing images), `student_right` and `teacher_right` (how many of these each classifies correctly), and
    `pictures`: file, index of the test image, label, and predicted class and confidence of both.
    """
    rows = _differing(student_logits, teacher_logits)
    student, teacher = student_logits.argmax(axis=1), teacher_logits.argmax(axis=1)
    student_probabilities, teacher_probabilities = (np.exp(log_softmax(x)) for x in (student_logits, teacher_logits))
    (folder / FOLDER).mkdir(exist_ok=True)
    for old in (folder / FOLDER).glob("*.png"):  # of the run before it was resumed
        old.unlink()
    pictures = []
    for i in rows[:REPORT_PICTURES].tolist():
        name = f"{FOLDER}/{i:06}.png"
        with atomic_file(folder / name) as part:
            part.write_bytes(png(test.images[i]))
        picture = {"file": name, "index": i, "label": int(test.labels[i])}
        picture |= {"student": int(student[i]), "student_confidence": float(student_probabilities[i, student[i]])}
        picture |= {"teacher": int(teacher[i]), "teacher_confidence": float(teacher_probabilities[i, teacher[i]])}
        pictures.append(picture)
    return {
        "images": len(test.labels),
        "count": len(rows),
        "student_right": int((student == test.labels)[rows].sum()),
        "teacher_right": int((teacher == test.labels)[rows].sum()),
        "pictures": pictures,
    }


def png(image: np.ndarray) -> bytes:
    """A uint8 image `[h, w, c]` as PNG of at most 96 pixels a side, reduced by means of square blocks.

    One channel is gray, three are RGB; of any other number the mean is gray. Rows that fill no block are cut off.
    """
    if image.shape[2] not in (1, 3):
        image = np.rint(image.mean(axis=2, keepdims=True)).astype(np.uint8)
    picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
    step = -(-max(picture.size) // MAX_SIDE)
    if step > 1:
        factors = [min(step, side) for side in picture.size]
        box = [side // factor * factor for side, factor in zip(picture.size, factors, strict=True)]
        picture = picture.reduce(tuple(factors), box=(0, 0, *box))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()
