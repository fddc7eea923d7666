"""The images on which student and teacher differ: which, in what order, in TensorBoard and in the report."""

import numpy as np
import pytest
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
    assert disagreement.write_tensorboard(student, teacher, examples, NAMES, tmp_path, 7) == 3
    assert shown["images"] == [5, 3, 1]
    assert shown["titles"][0] == "label a very long na\nteacher dog\nstudent a very long na"
    assert shown["titles"][1] == "label cat\nteacher cat\nstudent dog"
    text, image = written(tmp_path)
    assert text[0] == image[0] == 7 and b"3 of 6" in text[1].tensor.string_val[0]
    assert image[1].metadata.plugin_data.plugin_name == "images"
    # Written again (a run that was killed right after), it takes the place of the first.
    disagreement.write_tensorboard(student, teacher, examples, NAMES, tmp_path, 7)
    assert len(written(tmp_path)) == 2


def test_without_a_difference_there_is_text_and_no_picture(tmp_path):
    examples = Examples(np.zeros((2, 8, 8, 3), np.uint8), np.int32([0, 1]))
    same = logits([0, 1], [1, 1])
    assert disagreement.write_tensorboard(same, same, examples, NAMES, tmp_path, 3) == 0
    [(step, value)] = written(tmp_path)
    assert step == 3 and b"0 of 2" in value.tensor.string_val[0]


def test_the_grid_shows_the_pixels():
    """Gray images keep their gray (no stretching to the darkest and lightest), color ones their color."""
    gray = disagreement.grid(np.full((7, 8, 8, 1), 100, np.uint8), ["one\ntwo"] * 7)
    assert gray.dtype == np.uint8 and gray.shape == (2 * 154, 5 * 124, 3)
    assert (gray == 100).all(axis=-1).mean() > 0.4
    assert (gray[154:, 2 * 124 :] == 255).all(), "seven images leave three places white"
    assert (gray[:30, :124] < 100).any(), "a title"
    red = disagreement.grid(np.full((1, 8, 8, 3), (200, 10, 30), np.uint8), ["t"])
    assert (red == (200, 10, 30)).all(axis=-1).mean() > 0.4


def test_the_grid_enlarges_without_mixing_pixels_and_does_not_reduce():
    checks = (np.indices((14, 28)).sum(axis=0) % 2 * 255).astype(np.uint8)
    picture = disagreement.grid(checks[None, ..., None], ["t"])
    np.testing.assert_array_equal(picture[15 : 15 + 56, 6 : 6 + 112, 0], checks.repeat(4, axis=0).repeat(4, axis=1))
    large = np.zeros((1, 200, 150, 3), np.uint8)
    assert disagreement.grid(large, ["t"]).shape == (15 + 200 + 12, 150 + 12, 3)


def decoded(image):
    return tf.io.decode_png(disagreement.png(image)).numpy()


@pytest.mark.parametrize("channels", (1, 3))
def test_a_png_holds_the_pixels(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    np.testing.assert_array_equal(decoded(image), image)


def test_other_channels_become_gray():
    image = np.stack([np.full((2, 2), 10, np.uint8), np.full((2, 2), 30, np.uint8)], axis=2)
    assert (decoded(image) == 20).all()


def test_large_images_become_means_of_blocks():
    image = np.zeros((193, 10, 1), np.uint8)  # 193 = 64 * 3 + 1: blocks of 3, the last row cut off
    image[0:3, 0:3] = 90
    image[192] = 255
    reduced = decoded(image)
    assert reduced.shape == (64, 3, 1) and reduced[0, 0, 0] == 90 and reduced.sum() == 90
    assert decoded(image[:96]).shape == (96, 10, 1)
    assert decoded(np.zeros((1000, 1, 3), np.uint8)).shape == (90, 1, 3)


def test_the_surest_come_first(tmp_path):
    #                          same        differ, unsure  differ, sure    differ, both wrong
    student = np.log([[0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.05, 0.05, 0.9], [0.5, 0.3, 0.2]])
    teacher = np.log([[0.9, 0.05, 0.05], [0.6, 0.2, 0.2], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    test = Examples(np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 0, 2, 2], np.int32))
    test.images[2] += 7
    (tmp_path / "differences").mkdir()
    (tmp_path / "differences/000009.png").write_text("of a run before")
    result = disagreement.write_pictures(student, teacher, test, tmp_path)
    assert {k: result[k] for k in ("images", "count", "student_right", "teacher_right")} == {
        "images": 4,
        "count": 3,
        "student_right": 1,
        "teacher_right": 1,
    }
    assert [picture["index"] for picture in result["pictures"]] == [2, 3, 1]
    first = result["pictures"][0]
    assert (first["label"], first["student"], first["teacher"]) == (2, 2, 1)
    assert (first["student_confidence"], first["teacher_confidence"]) == pytest.approx((0.9, 0.7))
    assert {path.name for path in (tmp_path / "differences").iterdir()} == {f"00000{i}.png" for i in (1, 2, 3)}
    assert (tf.io.decode_png((tmp_path / first["file"]).read_bytes()).numpy() == 7).all()


def test_no_difference_and_too_many(tmp_path):
    logits = np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    test = Examples(np.zeros((60, 4, 4, 3), np.uint8), np.zeros(60, np.int32))
    assert disagreement.write_pictures(logits, logits, test, tmp_path)["pictures"] == []
    result = disagreement.write_pictures(logits, np.roll(logits, 1, axis=1), test, tmp_path)
    assert result["count"] == 60 and len(result["pictures"]) == disagreement.REPORT_PICTURES
