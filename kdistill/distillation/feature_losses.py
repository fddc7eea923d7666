"""Losses on features, `[batch, ...]` of student and teacher in, one float32 value per example out.

Features are the outputs of a layer, channels last: `[batch, height, width, channels]`, `[batch, units]` and so on.
`hint` and `attention_transfer` compare the two features of an example. `rkd_distance`, `rkd_angle` and
`similarity_preserving` compare relations *between* the examples of a batch (with several replicas, of the part on one
replica), so student and teacher may have different shapes: an example is flattened, in row-major order, to one vector.
Pool large maps first: the cost grows with the length of the vector. All raise `InputError` for features that are not
`[batch, ...]` of the same batch.

Example i gets the terms that belong to it (its row, or the angles at it), and the mean over `[batch]` is the mean over
all terms of the batch. The loss of a batch too small for a relation is 0.

Computed in float64, returned as float32: squared activations leave the range of float16, and a distance from a Gram
matrix is a small difference of large numbers.
"""

import tensorflow as tf

from kdistill.distillation.losses import narrow, unit, wide
from kdistill.errors import InputError

# Examples whose squared distance is below this part of their squared lengths are equal: the difference is rounding.
SAME = 1e-12


def hint(student_features, teacher_features) -> tf.Tensor:
    """Squared difference of features, the mean over an example, `[batch]` (FitNets, Romero 2015, arXiv 1412.6550).

    A student with other channels needs a projector (the paper's regressor), which is trained with the student and
    removed afterwards. The paper uses half the sum instead of the mean: its weight is weight * features / 2 here.
    Raises `InputError` for different shapes.
    """
    student, teacher = _pair(student_features, teacher_features)
    if not student.shape.is_compatible_with(teacher.shape):
        raise InputError(
            f"hint expects student and teacher features of one shape, received {student.shape} and {teacher.shape}. "
            "Project the student's with a 1x1 convolution or a Dense layer, or use attention_transfer, rkd_distance, "
            "rkd_angle or similarity_preserving, which do not need equal channels."
        )
    return narrow(tf.reduce_mean((_flat(student) - _flat(teacher)) ** 2, axis=-1))


def attention_transfer(student_features, teacher_features) -> tf.Tensor:
    """Squared distance of unit attention maps, `[batch]`, from 0 to 2 (Zagoruyko and Komodakis 2017, arXiv 1612.03928).

    The map of `[height, width, channels]` is the sum of squares over channels, l2-normalized over height x width. Maps
    of different sizes are averaged, by area, to the smaller height and the smaller width. A map of zeros stays zeros.
    The authors' code uses the mean over the map instead of the sum: their weight of 1000 is 1000 / (height * width)
    here. Raises `InputError` unless both features are `[batch, height, width, channels]`.
    """
    student, teacher = _pair(student_features, teacher_features)
    if student.shape.rank != 4 or teacher.shape.rank != 4:
        raise InputError(
            "attention_transfer expects features [batch, height, width, channels] of both models, received "
            f"{student.shape} and {teacher.shape}. Use the output of a convolution, before global pooling."
        )
    student, teacher = (tf.reduce_sum(features**2, axis=-1) for features in (student, teacher))
    if not (student.shape[1:].is_fully_defined() and student.shape[1:] == teacher.shape[1:]):
        height, width = tf.unstack(tf.minimum(tf.shape(student)[1:], tf.shape(teacher)[1:]))
        student, teacher = _averaged(student, height, width), _averaged(teacher, height, width)
    return narrow(tf.reduce_sum((unit(_flat(student), -1) - unit(_flat(teacher), -1)) ** 2, axis=-1))


def rkd_distance(student_features, teacher_features) -> tf.Tensor:
    """Huber loss of distances between examples, in units of their mean, `[batch]` (Park et al. 2019, arXiv 1904.05068).

    Example i gets the mean over the other examples j; each model has its own mean distance, over all pairs of two
    examples, and the student's is part of the gradient. A factor on either model's features, and a vector added to all
    of them, change nothing. Examples with equal features have distance 0 and no gradient; a batch of 1 gives 0.
    """
    student, teacher = _pair(student_features, teacher_features)
    student, teacher = _over_mean(_distances(_gram(student))), _over_mean(_distances(_gram(teacher)))
    others = tf.maximum(_count(student) - 1, 1)
    return narrow(tf.reduce_sum(_huber(student - teacher), axis=-1) / others)


def rkd_angle(student_features, teacher_features) -> tf.Tensor:
    """Huber loss of the cosines of the angles i-j-k between examples, `[batch]` (Park et al. 2019, arXiv 1904.05068).

    Example j gets the mean over the ordered pairs of two other examples. Invariances as `rkd_distance`, and rotations.
    An angle that the teacher does not define (i or k equals j) counts 0; one that the student alone does not define has
    cosine 0 and no gradient. A batch of 1 or 2 gives 0. Memory grows with batch^3: about ten tensors of 8 * batch^3
    bytes, 17 MB each at 128, 1 GB each at 512.
    """
    student, teacher = _pair(student_features, teacher_features)
    student_cosines, _ = _cosines(_gram(student))
    teacher_cosines, defined = _cosines(_gram(teacher))
    terms = tf.where(defined, _huber(student_cosines - teacher_cosines), tf.zeros_like(student_cosines))
    others = _count(student) - 1
    return narrow(tf.reduce_sum(terms, axis=[1, 2]) / tf.maximum(others * (others - 1), 1))


def similarity_preserving(student_features, teacher_features) -> tf.Tensor:
    """Squared difference of Gram matrices with unit rows, `[batch]` (Tung and Mori 2019, arXiv 1907.09682).

    Example i gets row i: the mean over j of `(S_ij - T_ij)^2`, at most 4 / batch. A factor on either model's features
    changes nothing, a constant added does. An example with features of zeros has a row of zeros; a batch of 1 gives 0.
    """
    student, teacher = (_flat(features) for features in _pair(student_features, teacher_features))
    student, teacher = (unit(tf.matmul(f, f, transpose_b=True), -1) for f in (student, teacher))
    return narrow(tf.reduce_mean((student - teacher) ** 2, axis=-1))


def _averaged(maps: tf.Tensor, height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    rows, columns = _overlaps(tf.shape(maps)[1], height), _overlaps(tf.shape(maps)[2], width)
    return tf.einsum("ph,bhw,qw->bpq", rows, maps, columns)


def _overlaps(size: tf.Tensor, parts: tf.Tensor) -> tf.Tensor:
    """`[parts, size]`: the share of each of `parts` equal parts that each of `size` cells covers; rows sum to 1."""
    cells = tf.cast(tf.range(size), tf.float64)
    length = tf.cast(size, tf.float64) / tf.cast(parts, tf.float64)
    starts = tf.cast(tf.range(parts), tf.float64)[:, tf.newaxis] * length
    overlap = tf.minimum(starts + length, cells + 1) - tf.maximum(starts, cells)
    return tf.maximum(overlap, 0) / length


def _gram(features: tf.Tensor) -> tf.Tensor:
    """Inner products of examples about their mean, `[batch, batch]`: the distances are the same, cancellation less."""
    flat = _flat(features)
    flat -= tf.reduce_mean(flat, axis=0, keepdims=True)
    return tf.matmul(flat, flat, transpose_b=True)


def _distances(gram: tf.Tensor) -> tf.Tensor:
    """Distances between examples, `[batch, batch]`; exactly 0, without a gradient, between equal ones."""
    lengths = tf.linalg.diag_part(gram)
    lengths = lengths[:, tf.newaxis] + lengths[tf.newaxis, :]
    squares = lengths - 2 * gram
    same = squares <= SAME * lengths
    # The square root of 1 replaces that of 0, whose gradient is infinite.
    return tf.where(same, tf.zeros_like(squares), tf.sqrt(tf.where(same, tf.ones_like(squares), squares)))


def _over_mean(distances: tf.Tensor) -> tf.Tensor:
    """Divided by the mean over all ordered pairs of two examples; zeros stay zeros."""
    count = _count(distances)
    mean = tf.reduce_sum(distances) / tf.maximum(count * (count - 1), 1)
    return tf.math.divide_no_nan(distances, mean)


def _cosines(gram: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Cosines of the angles at j between i and k, `[j, i, k]`, and where they are defined and of three examples.

    From inner products: (i - j).(k - j) = ik - ij - jk + jj, without a tensor of all differences.
    """
    distances = _distances(gram)
    same = distances == 0
    inverse = tf.math.reciprocal_no_nan(distances)
    square = tf.linalg.diag_part(gram)[:, tf.newaxis, tf.newaxis]
    inner = gram[tf.newaxis, :, :] - gram[:, :, tf.newaxis] - gram[:, tf.newaxis, :] + square
    three = ~tf.eye(tf.shape(gram)[0], dtype=tf.bool)
    defined = ~same[:, :, tf.newaxis] & ~same[:, tf.newaxis, :] & three[tf.newaxis, :, :]
    return inner * inverse[:, :, tf.newaxis] * inverse[:, tf.newaxis, :], defined


def _huber(difference: tf.Tensor) -> tf.Tensor:
    size = tf.abs(difference)
    return tf.where(size <= 1, difference**2 / 2, size - 0.5)


def _count(matrix: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.shape(matrix)[0], tf.float64)


def _flat(features: tf.Tensor) -> tf.Tensor:
    return tf.reshape(features, [tf.shape(features)[0], -1])


def _pair(student_features, teacher_features) -> tuple[tf.Tensor, tf.Tensor]:
    student, teacher = wide(student_features), wide(teacher_features)
    ranks = student.shape.rank, teacher.shape.rank
    if None in ranks or min(ranks) < 2 or not student.shape[:1].is_compatible_with(teacher.shape[:1]):
        raise InputError(
            f"Features expect [batch, ...] of the same examples, received {student.shape} from the student and "
            f"{teacher.shape} from the teacher."
        )
    return student, teacher
