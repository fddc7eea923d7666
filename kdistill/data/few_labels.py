"""Partly labeled data: which labels students may see, and what that makes of the training images. NumPy alone.

The labeled images are chosen with the same share of every class, the same whatever a run's seed, and validation is
held out of them: whoever has 1,000 labels has no others to validate with. The rest are unlabeled: they count towards
the teacher's terms only. `splits` is a `data.Splits` in all of this module, which stands before `data`.
"""

import dataclasses

import numpy as np

from kdistill.data.lazy_images import subset
from kdistill.errors import InputError
from kdistill.recipe import Data


def choose_labeled(labels: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Two masks over the images with these labels, bool `[n]`: held out for validation, and labeled in training.

    `data.labeled` images, or `data.labeled_share` of all if that is fewer, are labeled, in equal numbers by class
    (as far as they divide); `data.validation` of them are held out, one of each class at least.
    """
    classes = np.unique(labels)
    count = min(data.labeled, int(data.labeled_share * len(labels)))
    share, more = divmod(count, len(classes))
    held, known = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    random = np.random.Generator(np.random.Philox(key=[1, 0]))
    for place, label in enumerate(classes):
        members = random.permutation(np.flatnonzero(labels == label))
        wanted = share + (place < more)
        if wanted < 2 or wanted > len(members):
            raise InputError(
                f"{count} labeled images of {len(classes)} classes are {wanted} of class {label}, which has "
                f"{len(members)}; expected 2 at least, one of them for validation. Mend data.labeled or "
                "data.labeled_share."
            )
        aside = min(max(1, round(data.validation * wanted)), wanted - 1)
        held[members[:aside]] = True
        known[members[aside:wanted]] = True
    return held, known


def for_student(splits):
    """The splits as a student sees them: label -1 where there is none, so that only the teacher's terms count."""
    if splits.labeled_mask is None:
        return splits
    labels = np.where(splits.labeled_mask, splits.train.labels, -1).astype(np.int32)
    return dataclasses.replace(splits, train=dataclasses.replace(splits.train, labels=labels))


def for_control(splits):
    """The splits for training on labels alone: the labeled images, repeated to as many as there are images in all.

    So the control takes the same number of steps of the same batch size, and every image in a batch has a label. Drawn
    from all images its batches would be nearly empty, and the comparison unfair.
    """
    if splits.labeled_mask is None:
        return splits
    places = np.resize(np.flatnonzero(splits.labeled_mask), len(splits.train))
    train = dataclasses.replace(
        splits.train, images=subset(splits.train.images, places), labels=splits.train.labels[places]
    )
    return dataclasses.replace(splits, train=train)


def for_teacher(splits, data: Data):
    """The splits that the teacher is trained on: all labels, or (`data.teacher_labels`) the students' alone."""
    return splits if data.teacher_labels == "all" else for_control(splits)


def label_counts(splits) -> dict[str, int]:
    """How many training images have a label that students see, and how many have none."""
    known = len(splits.train) if splits.labeled_mask is None else int(splits.labeled_mask.sum())
    return {"labeled": known, "unlabeled": len(splits.train) - known}
