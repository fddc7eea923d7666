"""The picture of what student and teacher do not agree on: the right images, the right order, the right words."""

import numpy as np
import tensorflow as tf

from kdistill.data.splits import Examples
from kdistill.evaluation import disagreement
from kdistill.training import callbacks

NAMES = ("cat", "dog", "a very long name of a class")


def logits(classes, sharpness):
    return np.float32(sharpness)[:, None] * np.eye(3, dtype=np.float32)[classes]


def written(folder):
    values = []
    for path in folder.rglob("events*"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = callbacks.Event.FromString(record)
            values += [(event.step, value) for value in event.summary.value]
    return values


def test_the_images_that_differ_most_certain_first(tmp_path, monkeypatch):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    examples = Examples(images, np.int32([0, 1, 2, 0, 1, 2]))
    teacher = logits([0, 1, 2, 0, 1, 1], [1, 2, 3, 4, 5, 6])
    student = logits([0, 2, 2, 1, 1, 2], [1, 1, 1, 1, 1, 1])
    shown = {}

    def grid(chosen, titles):
        shown.update(images=chosen[:, 0, 0, 0].tolist(), titles=titles)
        return np.zeros((4, 4, 4), np.uint8)

    monkeypatch.setattr(disagreement, "grid", grid)
    assert disagreement.write(student, teacher, examples, NAMES, tmp_path, 7) == 3
    assert shown["images"] == [5, 3, 1]
    assert shown["titles"][0] == "is a very long na\nteacher dog\nstudent a very long na"
    assert shown["titles"][1] == "is cat\nteacher cat\nstudent dog"
    text, image = written(tmp_path)
    assert text[0] == image[0] == 7 and b"3 of 6" in text[1].tensor.string_val[0]
    assert image[1].metadata.plugin_data.plugin_name == "images"
    # Written again (a run that was killed right after), it takes the place of the first.
    disagreement.write(student, teacher, examples, NAMES, tmp_path, 7)
    assert len(written(tmp_path)) == 2


def test_no_difference_is_said_without_a_picture(tmp_path):
    examples = Examples(np.zeros((2, 8, 8, 3), np.uint8), np.int32([0, 1]))
    same = logits([0, 1], [1, 1])
    assert disagreement.write(same, same, examples, NAMES, tmp_path, 3) == 0
    [(step, value)] = written(tmp_path)
    assert step == 3 and b"0 of 2" in value.tensor.string_val[0]


def test_the_grid_shows_the_pixels():
    """Gray images keep their gray (no stretching to the darkest and lightest), color ones their color."""
    gray = disagreement.grid(np.full((7, 8, 8, 1), 100, np.uint8), ["t"] * 7)
    assert gray.dtype == np.uint8 and gray.shape == (380, 750, 4)
    assert (gray[..., :3] == 100).all(axis=-1).mean() > 0.2
    red = disagreement.grid(np.full((1, 8, 8, 3), (200, 10, 30), np.uint8), ["t"])
    assert (red[..., :3] == (200, 10, 30)).all(axis=-1).mean() > 0.2
