"""The images on which a student names another class than its teacher, as a picture for TensorBoard."""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from kdistill.data import Examples

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
