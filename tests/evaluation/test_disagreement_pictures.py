"""The images on which student and teacher differ: which, in what order, and that a PNG holds their very pixels."""

import numpy as np
import pytest
import tensorflow as tf

from kdistill.data.splits import Examples
from kdistill.evaluation import disagreement


@pytest.mark.parametrize("channels", (1, 3))
def test_a_png_holds_the_pixels(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    np.testing.assert_array_equal(tf.io.decode_png(disagreement.png(image), channels).numpy(), image)


def test_other_channels_become_gray():
    image = np.stack([np.full((2, 2), 10, np.uint8), np.full((2, 2), 30, np.uint8)], axis=2)
    assert (tf.io.decode_png(disagreement.png(image), 1).numpy() == 20).all()


def test_large_images_become_means_of_blocks():
    image = np.zeros((193, 10, 1), np.uint8)  # 193 = 64 * 3 + 1: blocks of 3, the last row cut off
    image[0:3, 0:3] = 90
    image[192] = 255
    found = disagreement.smaller(image)
    assert found.shape == (64, 3, 1) and found[0, 0, 0] == 90 and found.sum() == 90
    assert disagreement.smaller(image[:96]).shape == (96, 10, 1)
    assert disagreement.smaller(np.zeros((1000, 1, 3), np.uint8)).shape == (90, 1, 3)


def test_the_surest_come_first(tmp_path):
    #                          same        differ, unsure  differ, sure    differ, both wrong
    student = np.log([[0.8, 0.1, 0.1], [0.3, 0.4, 0.3], [0.05, 0.05, 0.9], [0.5, 0.3, 0.2]])
    teacher = np.log([[0.9, 0.05, 0.05], [0.6, 0.2, 0.2], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    test = Examples(np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 0, 2, 2], np.int32))
    test.images[2] += 7
    (tmp_path / "differences").mkdir()
    (tmp_path / "differences/000009.png").write_text("of a run before")
    found = disagreement.differing(student, teacher, test, tmp_path)
    assert {k: found[k] for k in ("images", "count", "student_right", "teacher_right")} == {
        "images": 4,
        "count": 3,
        "student_right": 1,
        "teacher_right": 1,
    }
    assert [each["index"] for each in found["shown"]] == [2, 3, 1]
    first = found["shown"][0]
    assert (first["label"], first["student"], first["teacher"]) == (2, 2, 1)
    assert (first["student_confidence"], first["teacher_confidence"]) == pytest.approx((0.9, 0.7))
    assert {path.name for path in (tmp_path / "differences").iterdir()} == {f"00000{i}.png" for i in (1, 2, 3)}
    assert (tf.io.decode_png((tmp_path / first["file"]).read_bytes()).numpy() == 7).all()


def test_no_difference_and_too_many(tmp_path):
    logits = np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    test = Examples(np.zeros((60, 4, 4, 3), np.uint8), np.zeros(60, np.int32))
    assert disagreement.differing(logits, logits, test, tmp_path)["shown"] == []
    found = disagreement.differing(logits, np.roll(logits, 1, axis=1), test, tmp_path)
    assert found["count"] == 60 and len(found["shown"]) == disagreement.SHOWN
