"""Losses on outputs: student `[batch, n]` and teacher `[batch, n]` in, one float32 value per example out.

Most take logits of exclusive classes. `binary_cross_entropy` and `bernoulli_kl` take logits of independent labels,
`squared_error`, `masked_squared_error` and `huber` take numbers. Outputs with positions are flattened before.

The losses on what a layer outputs are in `feature_losses`. `docs/methods.md` says which to use when.

All are computed in float64 and returned as float32, whatever precision the models run in. Float32 is not enough: at
temperature 20 the rounding of a log-softmax, multiplied by T^2 = 400, is an error of 1e-4 in the loss. The tensors
are small (batch x classes), so the cost is not measurable.
"""

import tensorflow as tf

from kdistill.errors import InputError

# A vector that varies by less than this, relative to its largest value, is constant: the variation is rounding.
ROUNDING = 1e-12
# The logit of a class that is excluded. Finite, so that 0 times it is 0 and its gradient is 0, not NaN.
EXCLUDED = -1e30
# A vector with smaller entries counts as zero: squares of its entries leave the range of float64.
ZERO = 1e-150


def hard_cross_entropy(labels, student_logits) -> tf.Tensor:
    """Cross-entropy with the labels, in nats, `[batch]`.

    Labels are classes `[batch]` or distributions `[batch, classes]`. The loss of a class below 0 ("unlabeled") is 0.

    Example:
        hard_cross_entropy([0], [[0.0, 0.0]])  # ln 2: [0.6931]
    """
    logits = wide(student_logits)
    labels = tf.convert_to_tensor(labels)
    if labels.shape.rank == logits.shape.rank and logits.shape.rank == 2 and labels.shape[-1] != 1:
        return narrow(tf.nn.softmax_cross_entropy_with_logits(wide(labels), logits))
    labels = tf.cast(tf.reshape(labels, [-1]), tf.int64)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
    return narrow(tf.where(labels < 0, tf.zeros_like(loss), loss))


def kl_logits(student_logits, teacher_logits, temperature=1.0) -> tf.Tensor:
    """`T^2 * KL(softmax(t/T) || softmax(s/T))` in nats, `[batch]` (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    The factor T^2 keeps the gradient, `T * (softmax(s/T) - softmax(t/T))`, at one scale for every temperature.

    Example:
        kl_logits([[0.0, 0.0]], [[0.0, math.log(3)]], temperature=1.0)  # 0.75 ln 1.5 + 0.25 ln 0.5: [0.1308]
    """
    temperature = wide(temperature)
    teacher = tf.nn.log_softmax(wide(teacher_logits) / temperature)
    student = tf.nn.log_softmax(wide(student_logits) / temperature)
    return narrow(temperature**2 * _kl(teacher, student))


def binary_cross_entropy(labels, student_logits) -> tf.Tensor:
    """Cross-entropy of independent labels, in nats, the sum over the labels, `[batch]`.

    Labels are numbers from 0 to 1, `[batch, labels]`. A label that is missing (below 0 or NaN) does not count.

    Example:
        binary_cross_entropy([[1, 0]], [[0.0, 0.0]])  # 2 ln 2: [1.3863]
    """
    logits, labels = wide(student_logits), wide(labels)
    present = labels >= 0  # NaN is not
    labels = tf.where(present, labels, tf.zeros_like(labels))
    loss = tf.nn.softplus(logits) - labels * logits
    return narrow(tf.reduce_sum(tf.where(present, loss, tf.zeros_like(loss)), axis=-1))


def bernoulli_kl(student_logits, teacher_logits, temperature=1.0) -> tf.Tensor:
    """`T^2 * KL(sigmoid(t/T) || sigmoid(s/T))` of independent labels in nats, the sum over the labels, `[batch]`.

    A binary problem has one label. Its gradient is `T * (sigmoid(s/T) - sigmoid(t/T))`: for two classes the one of
    `kl_logits` with the logits 0 and s. Used for binary and multi-label distillation, as in Yang et al. 2023
    (arXiv 2308.06453).

    Example:
        bernoulli_kl([[0.0]], [[math.log(3)]])  # 0.75 ln 1.5 + 0.25 ln 0.5: [0.1308]
    """
    temperature = wide(temperature)
    student, teacher = wide(student_logits) / temperature, wide(teacher_logits) / temperature
    probability = tf.nn.sigmoid(teacher)
    present = probability * (tf.math.log_sigmoid(teacher) - tf.math.log_sigmoid(student))
    absent = tf.nn.sigmoid(-teacher) * (tf.math.log_sigmoid(-teacher) - tf.math.log_sigmoid(-student))
    return narrow(temperature**2 * tf.reduce_sum(present + absent, axis=-1))


def squared_error(student, teacher) -> tf.Tensor:
    """Squared difference of numbers, the mean over the last axis, `[batch]`.

    Example:
        squared_error([[0.0, 0.0]], [[1.0, 3.0]])  # [5.0]
    """
    return narrow(tf.reduce_mean((wide(student) - wide(teacher)) ** 2, axis=-1))


def masked_squared_error(labels, student) -> tf.Tensor:
    """Squared difference from the labels, the mean over the numbers of the last axis that are not NaN, `[batch]`."""
    student, labels = wide(student), wide(labels)
    present = ~tf.math.is_nan(labels)
    difference = tf.where(present, student - tf.where(present, labels, tf.zeros_like(labels)), tf.zeros_like(student))
    count = tf.reduce_sum(tf.cast(present, tf.float64), axis=-1)
    return narrow(tf.math.divide_no_nan(tf.reduce_sum(difference**2, axis=-1), count))


def huber(student, teacher, delta=1.0) -> tf.Tensor:
    """Huber's loss between numbers, the mean over the last axis, `[batch]` (Huber 1964).

    Half the squared difference up to `delta`, and linear beyond it: far off numbers of the teacher pull less.

    Example:
        huber([[0.0, 0.0]], [[1.0, 3.0]])  # (0.5 + 2.5) / 2: [1.5]
    """
    size, delta = tf.abs(wide(student) - wide(teacher)), wide(delta)
    loss = tf.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    return narrow(tf.reduce_mean(loss, axis=-1))


def soft_cross_entropy(student_logits, teacher_logits, temperature=1.0) -> tf.Tensor:
    """`T^2 * cross-entropy(softmax(t/T), softmax(s/T))` in nats, `[batch]`: the KL plus the teacher's entropy.

    The gradient is that of `kl_logits`; the value does not reach zero. At T = 1 it is the loss of He's study (2017).
    """
    temperature = wide(temperature)
    teacher = tf.nn.softmax(wide(teacher_logits) / temperature)
    student = tf.nn.log_softmax(wide(student_logits) / temperature)
    return narrow(-(temperature**2) * tf.reduce_sum(teacher * student, axis=-1))


def mse_logits(student_logits, teacher_logits) -> tf.Tensor:
    """Squared difference of logits, the mean over classes, `[batch]` (Ba and Caruana 2013, arXiv 1312.6184).

    A constant added to the logits of both models changes nothing; added to those of one model it does.
    """
    return narrow(tf.reduce_mean((wide(student_logits) - wide(teacher_logits)) ** 2, axis=-1))


def cosine(student_logits, teacher_logits) -> tf.Tensor:
    """`1 - cos(s, t)`, with the cosine similarity of the logits, `[batch]`, from 0 to 2.

    DistilBERT uses it for hidden states (Sanh et al. 2019, arXiv 1910.01108). A positive factor on the logits of either
    model changes nothing; a constant added to all logits does. A zero vector has cosine 0 with another vector (loss 1,
    no gradient) and 1 with another zero vector. Raises `InputError` for logits of different shapes.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    return narrow(tf.reduce_sum(_half_squared_distance(student, teacher, axis=-1), axis=-1))


def dkd(student_logits, teacher_logits, labels, alpha=1.0, beta=8.0, temperature=4.0) -> tf.Tensor:
    """`T^2 * (alpha * TCKD + beta * NCKD)` in nats, `[batch]`: decoupled KD (Zhao et al. 2022, arXiv 2203.08679).

    TCKD is the KL of (target, all others together), NCKD the KL among the others alone. `alpha = 1` with
    `beta = 1 - p_teacher(target)` would be `kl_logits`. Labels are classes `[batch]`, or distributions
    `[batch, classes]`, of which the largest entry is the target. Without a label (a class below 0) the target is the
    teacher's class. Finite for any finite logits: no probability is subtracted from 1. Raises `InputError` for logits
    of different shapes.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    temperature = wide(temperature)
    target = _target(labels, teacher)
    student_binary, student_others = _decoupled(student / temperature, target)
    teacher_binary, teacher_others = _decoupled(teacher / temperature, target)
    loss = wide(alpha) * _kl(teacher_binary, student_binary) + wide(beta) * _kl(teacher_others, student_others)
    return narrow(temperature**2 * loss)


def dist(student_logits, teacher_logits, beta=1.0, gamma=1.0, temperature=1.0) -> tf.Tensor:
    """`T^2 * (beta * inter + gamma * intra)`, `[batch]`: DIST (Huang et al. 2022, arXiv 2205.10536).

    On probabilities softmax(./T): inter is 1 - Pearson correlation over the classes of an example; intra is 1 - Pearson
    correlation over the examples of a class, the mean over classes. With unit vectors a, b the latter is
    `sum (a_i - b_i)^2 / 2`: example i gets `batch * (a_i - b_i)^2 / 2`, so that the mean over the batch is the paper's.

    A constant has correlation 0 with a vector that varies (loss 1, no gradient) and 1 with another constant, so intra
    is 0 in a batch of 1. There is no epsilon: a rare class counts as much as a frequent one. Raises `InputError` for
    logits of different shapes.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    temperature = wide(temperature)
    student, teacher = tf.nn.softmax(student / temperature), tf.nn.softmax(teacher / temperature)
    inter = tf.reduce_sum(_half_squared_distance(_centered(student, -1), _centered(teacher, -1), axis=-1), axis=-1)
    batch = tf.cast(tf.shape(student)[0], tf.float64)
    intra = batch * tf.reduce_mean(
        _half_squared_distance(_centered(student, 0), _centered(teacher, 0), axis=0), axis=-1
    )
    return narrow(temperature**2 * (wide(beta) * inter + wide(gamma) * intra))


def standardized_kl(student_logits, teacher_logits, temperature=2.0) -> tf.Tensor:
    """`T^2 * KL(softmax(z(t)/T) || softmax(z(s)/T))` in nats, `z` the z-score over classes, `[batch]`.

    Logit standardization (Sun et al. 2024, arXiv 2403.01427). T is the paper's base temperature; the standard deviation
    divides by the number of classes. A constant added to the logits of either model, or a positive factor on them,
    changes nothing. Logits that are all equal have z-scores of 0. Raises `InputError` for logits of different shapes.
    """
    student, teacher = _pair(student_logits, teacher_logits)
    return kl_logits(_z_score(student), _z_score(teacher), temperature)


def wide(values) -> tf.Tensor:
    """The values in float64, in which losses are computed."""
    return tf.cast(values, tf.float64)


def narrow(loss: tf.Tensor) -> tf.Tensor:
    """The loss in float32, in which losses are returned."""
    return tf.cast(loss, tf.float32)


def unit(vectors: tf.Tensor, axis: int) -> tf.Tensor:
    """The float64 `vectors` along `axis` at length 1; a zero vector stays zero, with a gradient of 0. NaN stays NaN."""
    # Divided by the largest entry first: squares of very small or large numbers leave the range of float64. The
    # result does not depend on that factor, so neither does the gradient.
    largest = tf.stop_gradient(tf.reduce_max(tf.abs(vectors), axis=axis, keepdims=True))
    # Not `largest <= ...`: under XLA the maximum of NaNs can be -inf, and a broken model would look like a zero vector.
    zero = tf.reduce_all(tf.abs(vectors) <= ZERO, axis=axis, keepdims=True)
    scaled = vectors / tf.where(zero, tf.ones_like(largest), largest)
    # The branch not taken must be differentiable too: 0 times an infinite gradient would be NaN.
    safe = tf.where(zero, tf.ones_like(scaled), scaled)
    length = tf.sqrt(tf.reduce_sum(safe**2, axis=axis, keepdims=True))
    return tf.where(zero, tf.zeros_like(scaled), scaled / length)


def _half_squared_distance(student: tf.Tensor, teacher: tf.Tensor, axis: int) -> tf.Tensor:
    """Terms whose sum along `axis` is 1 - cosine: half the squared distance of unit vectors.

    1 - a.b would lose all digits near 0, and would not be 0 for equal inputs.
    """
    student, teacher = unit(student, axis), unit(teacher, axis)
    student_zero, teacher_zero = (tf.reduce_all(v == 0, axis=axis, keepdims=True) for v in (student, teacher))
    # With one zero vector, half the squared distance is 1/2: the other half makes the cosine 0.
    one_is_zero = tf.cast(tf.not_equal(student_zero, teacher_zero), tf.float64)
    return ((student - teacher) ** 2 + one_is_zero / tf.cast(tf.shape(student)[axis], tf.float64)) / 2


def _centered(values: tf.Tensor, axis: int) -> tf.Tensor:
    """`values` minus their mean along `axis`; exactly 0 where they are constant but for rounding."""
    centered = values - tf.reduce_mean(values, axis=axis, keepdims=True)
    size = tf.reduce_max(tf.abs(values), axis=axis, keepdims=True)
    constant = tf.reduce_all(tf.abs(centered) <= ROUNDING * size, axis=axis, keepdims=True)
    return tf.where(constant, tf.zeros_like(centered), centered)


def _z_score(logits: tf.Tensor) -> tf.Tensor:
    return unit(_centered(logits, -1), -1) * tf.sqrt(tf.cast(tf.shape(logits)[-1], tf.float64))


def _target(labels, teacher: tf.Tensor) -> tf.Tensor:
    """The class that `dkd` takes apart from the others, `[batch]`."""
    labels = tf.convert_to_tensor(labels)
    if labels.shape.rank == 2 and labels.shape[-1] != 1:
        return tf.argmax(labels, axis=-1)
    labels = tf.cast(tf.reshape(labels, [-1]), tf.int64)
    return tf.where(labels < 0, tf.argmax(teacher, axis=-1), labels)


def _decoupled(logits: tf.Tensor, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Log-probabilities of (target, the others together), `[batch, 2]`, and among the others, `[batch, classes]`.

    All from logits: 1 - p(target) as a difference is 0 for a certain model, and its logarithm infinite.
    """
    mask = tf.one_hot(target, tf.shape(logits)[-1], on_value=True, off_value=False)
    others = tf.where(mask, tf.constant(EXCLUDED, tf.float64), logits)
    binary = tf.stack([tf.gather(logits, target, batch_dims=1), tf.reduce_logsumexp(others, axis=-1)], axis=-1)
    return tf.nn.log_softmax(binary), tf.nn.log_softmax(others)


def _kl(teacher: tf.Tensor, student: tf.Tensor) -> tf.Tensor:
    """KL(teacher || student) of log-probabilities, `[batch]`."""
    return tf.reduce_sum(tf.exp(teacher) * (teacher - student), axis=-1)


def _pair(student_logits, teacher_logits) -> tuple[tf.Tensor, tf.Tensor]:
    """Both logits in float64; raises `InputError` unless they have one shape `[batch, classes]`."""
    student, teacher = wide(student_logits), wide(teacher_logits)
    if student.shape.rank != 2 or teacher.shape.rank != 2 or not student.shape.is_compatible_with(teacher.shape):
        raise InputError(
            f"Student and teacher logits expect one shape [batch, classes], received {student.shape} and "
            f"{teacher.shape}. Give both models one output for each class, in the same order."
        )
    return student, teacher
