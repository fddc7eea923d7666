"""Partly labeled data: which labels are seen, by whom, and a run over two seeds on such data."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf

from kdistill.data import few_labels
from kdistill.data.splits import Splits, load
from kdistill.distillation import losses
from kdistill.errors import InputError
from kdistill.recipe import Data
from kdistill.recipe.checks import check_recipe
from kdistill.recipe.loading import load_recipe
from kdistill.runs.run import run


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load(load_recipe("mnist", "few_labels").data)


def test_the_sample_has_200_labeled_and_9800_unlabeled_images(splits):
    """Validation is held out of the 200: nobody has other labels to validate with."""
    assert few_labels.label_counts(splits) == {"labeled": 180, "unlabeled": 9800} and len(splits.validation) == 20
    assert (np.bincount(splits.train.labels[splits.labeled_mask]) == 18).all()
    assert (np.bincount(splits.validation.labels) == 2).all()


def test_all_of_mnist_has_1000_labeled_and_59000_unlabeled_images():
    labels = np.arange(60000) % 10
    validation, labeled = few_labels.choose_labeled(labels, load_recipe("mnist", "few_labels").data)
    assert (validation.sum(), labeled.sum(), (~validation & ~labeled).sum()) == (100, 900, 59000)
    assert not (validation & labeled).any()
    assert (np.bincount(labels[labeled]) == 90).all()


def test_numbers_that_do_not_divide():
    validation, labeled = few_labels.choose_labeled(np.arange(90) % 3, Data(labeled=20, validation=0.25))
    assert np.bincount((np.arange(90) % 3)[validation | labeled]).tolist() == [7, 7, 6] and validation.sum() == 6
    validation, labeled = few_labels.choose_labeled(
        np.arange(90) % 3, Data(labeled=90, labeled_share=0.1, validation=0.01)
    )
    assert (validation.sum(), labeled.sum()) == (3, 6)
    with pytest.raises(InputError, match="4 labeled images of 3 classes are 1 of class 1"):
        few_labels.choose_labeled(np.arange(90) % 3, Data(labeled=4))


@pytest.mark.slow
def test_student_and_control_see_the_same_labels(splits):
    student, control = few_labels.for_student(splits).train, few_labels.for_control(splits).train
    seen = student.labels >= 0
    np.testing.assert_array_equal(seen, splits.labeled_mask)
    np.testing.assert_array_equal(student.labels[seen], splits.train.labels[seen])
    assert student.images is splits.train.images
    assert len(control) == len(student) == 9980  # the same steps
    assert len(np.unique(control.images.reshape(9980, -1), axis=0)) == 180
    counts = np.bincount(control.labels)
    assert counts.max() - counts.min() <= 18  # 9,980 is 55 times 180, and 80
    assert few_labels.for_teacher(splits, Data(labeled=200)) is splits
    assert len(np.unique(few_labels.for_teacher(splits, Data(labeled=200, teacher_labels="same")).train.labels)) == 10


def test_the_choice_is_a_function_of_the_data_and_part_of_its_fingerprint(splits):
    few = load_recipe("mnist", "few_labels").data
    again = load(few)
    np.testing.assert_array_equal(again.labeled_mask, splits.labeled_mask)
    assert again.fingerprint == splits.fingerprint
    assert load(dataclasses.replace(few, labeled=190)).fingerprint != splits.fingerprint
    assert load(Data()).labeled_mask is None


def test_an_unlabeled_example_has_no_hard_loss():
    logits = tf.constant([[2.0, 0.0], [2.0, 0.0]])
    loss = losses.hard_cross_entropy(tf.constant([-1, 1]), logits).numpy()
    assert loss[0] == 0 and loss[1] == pytest.approx(np.log(1 + np.exp(2)))


def test_settings_that_do_nothing_are_refused():
    recipe = load_recipe("mnist")
    for bad, match in (
        ({"labeled_share": 0.5}, "1 without data.labeled"),
        ({"teacher_labels": "same"}, "all without data.labeled"),
        ({"labeled": 100, "teacher_labels": "none"}, "all or same"),
        ({"labeled": 0}, "1 or more"),
    ):
        with pytest.raises(InputError, match=match):
            check_recipe(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **bad)))
    with pytest.raises(InputError, match="seeds"):
        check_recipe(dataclasses.replace(recipe, seeds=0))


@pytest.mark.exhaustive
def test_a_run_over_two_seeds_on_few_labels(tmp_path):
    smoke = load_recipe("mnist", "smoke")
    few = dataclasses.replace(smoke.data, train_limit=400, labeled=40)
    recipe = dataclasses.replace(smoke, data=few, seeds=2, seed=3, exports=())
    result = run(recipe, tmp_path / "run", say=lambda text: None)
    names = [row["name"] for row in result["models"]]
    assert names == ["teacher", "control", "student", "control-1", "student-1"]
    assert result["data"]["labeled"] == 30 and result["data"]["unlabeled"] == 360
    assert len({fit["steps"] for name, fit in result["training"].items() if name != "teacher"}) == 1
    accuracy = {row["name"]: row["accuracy"] for row in result["models"]}
    verdict = result["verdict"]
    assert verdict["student"] == [accuracy["student"], accuracy["student-1"]] and verdict["seeds"] == 2
    assert verdict["control"] == [accuracy["control"], accuracy["control-1"]]
    assert result["training"]["control"]["hard"] != result["training"]["control-1"]["hard"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert verdict["sentence"] in text and "| 4 |" in text and "360 unlabeled" in text and "3 to 4 (teacher: 3)" in text
    more = dataclasses.replace(recipe, seeds=3)
    messages = []
    again = run(more, tmp_path / "run", resume=True, say=messages.append)
    assert again["verdict"]["student"][:2] == verdict["student"] and again["verdict"]["seeds"] == 3
    assert "student-1: already finished" in messages
    assert json.loads((tmp_path / "run" / "report.json").read_text())["verdict"] == again["verdict"]
