"""What a report shows of outputs other than one class for an image: masks beside images, labels, scattered numbers."""

import colorsys
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from kdistill.data.splits import Splits
from kdistill.evaluation.disagreement import png
from kdistill.evaluation.head_metrics import decisions, kind_of_labels, per_example, targets
from kdistill.files import atomic_file
from kdistill.networks.heads import CLASSES, LABELS, Head

FOLDER = "examples"  # of a run, with the pictures
WORST, TYPICAL = 6, 6  # test examples with the lowest scores, and evenly spaced ones
POINTS = 400  # of a scatter
GAP = 2  # pixels between the panels of a picture


def write(student: Mapping, teacher: Mapping, splits: Splits, folder: Path, heads: Mapping[str, tuple]) -> list[dict]:
    """Writes pictures into `folder`/examples, and returns what `report.json` holds of each output.

    Args:
        student, teacher: their outputs on the test examples by the names of the data.
        heads: by the same names, what the outputs of student and teacher mean.

    Returns for each output `output` (its name), `kind` (`positions`, `labels` or `numbers`), and what that kind has:
    `pictures` (file, index, score, of labels also the names that are on), or `points` (label, teacher, student).
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    for old in (folder / FOLDER).glob("*.png"):  # of the run before it was resumed
        old.unlink()
    sections = []
    for place, name in enumerate(splits.outputs):
        labels = splits.test.labels[name] if isinstance(splits.test.labels, Mapping) else splits.test.labels
        section = _section(place, name, student[name], teacher[name], labels, heads[name], splits, folder)
        if section:
            sections.append(section)
    return sections


def _section(place, name, student, teacher, labels, heads: tuple[Head, Head], splits: Splits, folder) -> dict | None:
    head, of_teacher = heads
    values, counted = targets(head, student, labels, name or "output")
    scores = per_example(head, student, labels, name or "output")
    if head.meaning == CLASSES and len(head.positions) == 2 and splits.has_images:
        chosen, predicted = _chosen(scores), [part.argmax(axis=-1) for part in (teacher, student)]
        colors = _palette(head.classes)
        panels = [np.where(counted, values, -1), *predicted]
        pictures = []
        for index in chosen:
            masks = [colors[np.where(panel[index] < 0, head.classes, panel[index])] for panel in panels]
            picture = _save(_beside(splits.test.images[index], masks), folder, place, index)
            pictures.append({**picture, "score": float(scores[index])})
        return {"output": name, "kind": "positions", "names": list(splits.class_names), "pictures": pictures}
    if head.meaning == LABELS and not head.positions and splits.has_images:
        on = {
            "label": values > 0.5,
            "teacher": decisions(_of_kind(of_teacher, teacher), teacher),
            "student": decisions(head, student),
        }
        names = splits.class_names or tuple(map(str, range(head.classes)))
        pictures = []
        for index in _chosen(scores):
            picture = _save(splits.test.images[index], folder, place, index)
            texts = {who: [names[i] for i in np.flatnonzero(rows[index])] for who, rows in on.items()}
            pictures.append({**picture, "score": float(scores[index]), **texts})
        return {"output": name, "kind": "labels", "pictures": pictures}
    if head.meaning not in (CLASSES, LABELS):
        rows = [part.reshape(-1)[counted.reshape(-1)] for part in (values, teacher, student)]
        places = np.linspace(0, len(rows[0]) - 1, min(POINTS, len(rows[0]))).round().astype(int)
        points = np.stack(rows, axis=1)[places].astype(np.float64)
        return {"output": name, "kind": "numbers", "points": points.tolist()}
    return None


def _of_kind(head: Head, outputs: np.ndarray) -> Head:
    return Head(head.meaning, kind_of_labels(head, outputs), head.shape)


def _chosen(scores: np.ndarray) -> list[int]:
    """The numbers of the test examples to show: those with the lowest scores, then evenly spaced ones."""
    worst = np.argsort(np.where(np.isnan(scores), np.inf, scores), kind="stable")[:WORST].tolist()
    typical = np.linspace(0, len(scores) - 1, TYPICAL).round().astype(int).tolist()
    return list(dict.fromkeys([*worst, *typical]))


def _palette(classes: int) -> np.ndarray:
    """A color for each class, uint8 `[classes + 1, 3]`: black for the first, gray for pixels without a label."""
    hues = [colorsys.hsv_to_rgb(i / max(1, classes - 1), 0.75, 1.0) for i in range(classes - 1)]
    return np.round(255 * np.array([(0, 0, 0), *hues, (0.5, 0.5, 0.5)])).astype(np.uint8)


def _beside(image: np.ndarray, masks: list[np.ndarray]) -> list[np.ndarray]:
    """The image in color, and the masks."""
    return [np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image, *masks]


def _save(image, folder: Path, place: int, index: int) -> dict:
    """Writes an image, or panels side by side, as a PNG. Returns its file and the number of the example."""
    name = f"{FOLDER}/{place}-{index:06}.png"
    with atomic_file(folder / name) as part:
        part.write_bytes(_png_of_panels(image) if isinstance(image, list) else png(image))
    return {"file": name, "index": int(index)}


def _png_of_panels(panels: list[np.ndarray]) -> bytes:
    height, width = panels[0].shape[:2]
    picture = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), (128, 128, 128))
    for place, panel in enumerate(panels):
        resized = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
        picture.paste(resized, (place * (width + GAP), 0))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()
