"""Partly labeled data: which labels students may see, and the training images that follow from it. NumPy alone.

The labeled images have the same share of every class and do not depend on a run's seed. The validation images are
taken from them: who has 1,000 labels has no others to validate with. The other images are unlabeled: only the
teacher's terms use them. `splits` is a `Splits` everywhere here; `splits` the module imports this one.
"""

import dataclasses

import numpy as np

from kdistill.errors import InputError
from kdistill.recipe import Data
from kdistill.recipe.values import CLASSES, LABELS, NUMBERS

MISSING = {CLASSES: -1, LABELS: -1, NUMBERS: float("nan")}  # the label of an example without one


def choose_labeled(labels: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the validation images and the labeled training images: two masks, bool `[n]`.

    `data.labeled` images, or `data.labeled_share` of all if that is fewer, are labeled, the same number in every class
    (as far as it divides). The share `data.validation` of them, at least one of every class, is for validation.
    """
    classes = np.unique(labels)
    count = min(data.labeled, int(data.labeled_share * len(labels)))
    per_class, remainder = divmod(count, len(classes))
    validation_mask, labeled_mask = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    random = np.random.Generator(np.random.Philox(key=[1, 0]))
    for position, label in enumerate(classes):
        members = random.permutation(np.flatnonzero(labels == label))
        size = per_class + (position < remainder)
        if size < 2 or size > len(members):
            raise InputError(
                f"{count} labeled images of {len(classes)} classes are {size} of class {label}, which has "
                f"{len(members)}; expected at least 2, one of them for validation. Fix data.labeled or "
                "data.labeled_share."
            )
        validation_size = min(max(1, round(data.validation * size)), size - 1)
        validation_mask[members[:validation_size]] = True
        labeled_mask[members[validation_size:size]] = True
    return validation_mask, labeled_mask


def choose_validation(classes: np.ndarray, share: float) -> np.ndarray:
    """The validation images, a mask, bool `[n]`: the same `share` of every class."""
    mask = np.zeros(len(classes), bool)
    random = np.random.Generator(np.random.Philox(key=[0, 0]))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        mask[random.permutation(members)[: round(share * len(members))]] = True
    return mask


def for_student(splits):
    """The splits as a student sees them: an unlabeled image has label -1, so that only the teacher's terms count."""
    if splits.labeled_mask is None:
        return splits
    train = splits.train
    if splits.outputs is None:
        labels = without(train.labels, ~splits.labeled_mask, -1)
    else:
        missing = {name: MISSING[output.meaning] for name, output in splits.outputs.items()}
        by_name = train.labels if isinstance(train.labels, dict) else {"": train.labels}
        labels = {name: without(array, ~splits.labeled_mask, missing[name]) for name, array in by_name.items()}
        labels = labels.get("", labels)
    return dataclasses.replace(splits, train=dataclasses.replace(train, labels=labels))


def without(labels: np.ndarray, hidden: np.ndarray, missing: float) -> np.ndarray:
    """The labels `[n, ...]`, `missing` where they are `hidden`: bool `[n]`, or `[n, ...]` for positions."""
    hidden = hidden.reshape(hidden.shape + (1,) * (labels.ndim - hidden.ndim))
    return np.where(hidden, np.asarray(missing, labels.dtype), labels)


def for_control(splits):
    """The splits for training on labels alone: the labeled images, repeated to the number of all images.

    So the control takes as many steps of the same batch size, and every image of a batch has a label. Drawn from all
    images, most of a batch would have no label, which would be an unfair comparison.
    """
    if splits.labeled_mask is None:
        return splits
    indexes = np.resize(np.flatnonzero(splits.labeled_mask), len(splits.train))
    return dataclasses.replace(splits, train=splits.train.select(indexes))


def for_teacher(splits, data: Data):
    """The splits for training the teacher: with all labels, or with those of students only (`data.teacher_labels`)."""
    return splits if data.teacher_labels == "all" else for_control(splits)


def label_counts(splits) -> dict[str, int]:
    """The numbers of training images with and without a label that students see."""
    labeled = len(splits.train) if splits.labeled_mask is None else int(splits.labeled_mask.sum())
    return {"labeled": labeled, "unlabeled": len(splits.train) - labeled}
