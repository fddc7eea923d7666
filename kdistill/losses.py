"""The losses of distillation: pure functions of logits, `[batch, classes]` in, one float32 value per example out.

Whatever precision the models run in, these compute in float64 and return float32. Float32 is not enough inside: at
temperature 20 the rounding of a log-softmax, multiplied by T^2 = 400, is an error of 1e-4 in the loss. The tensors
are small (batch x classes), so it costs nothing measurable.
"""

import tensorflow as tf


def wide(values) -> tf.Tensor:
    """float64, in which losses are computed."""
    return tf.cast(values, tf.float64)


def narrow(loss: tf.Tensor) -> tf.Tensor:
    """float32, in which they are returned."""
    return tf.cast(loss, tf.float32)


def kl_logits(student_logits, teacher_logits, temperature=1.0) -> tf.Tensor:
    """`T^2 * KL(softmax(t/T) || softmax(s/T))` in nats, `[batch]` (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    The factor T^2 keeps the gradient, `T * (softmax(s/T) - softmax(t/T))`, of one size whatever the temperature.
    """
    temperature = wide(temperature)
    teacher = tf.nn.log_softmax(wide(teacher_logits) / temperature)
    student = tf.nn.log_softmax(wide(student_logits) / temperature)
    return narrow(temperature**2 * tf.reduce_sum(tf.exp(teacher) * (teacher - student), axis=-1))


def soft_cross_entropy(student_logits, teacher_logits, temperature=1.0) -> tf.Tensor:
    """`T^2 * cross-entropy(softmax(t/T), softmax(s/T))` in nats, `[batch]`: the KL plus the teacher's entropy.

    Its gradient is that of `kl_logits`; its value does not fall to zero (at T = 1 the loss of He's study, 2017).
    """
    temperature = wide(temperature)
    teacher = tf.nn.softmax(wide(teacher_logits) / temperature)
    student = tf.nn.log_softmax(wide(student_logits) / temperature)
    return narrow(-(temperature**2) * tf.reduce_sum(teacher * student, axis=-1))


def mse_logits(student_logits, teacher_logits) -> tf.Tensor:
    """Squared difference of logits, the mean over classes, `[batch]` (Ba and Caruana 2013, arXiv 1312.6184).

    +5 on the logits of both models changes nothing; on one model's alone it does: the level is matched too.
    """
    return narrow(tf.reduce_mean((wide(student_logits) - wide(teacher_logits)) ** 2, axis=-1))


def hard_cross_entropy(labels, student_logits) -> tf.Tensor:
    """Cross-entropy with the labels in nats, `[batch]`.

    Labels are classes `[batch]` or distributions `[batch, classes]`. A class below 0 means
    "unlabelled": its loss is 0.
    """
    logits = wide(student_logits)
    labels = tf.convert_to_tensor(labels)
    if labels.shape.rank == logits.shape.rank and logits.shape.rank == 2 and labels.shape[-1] != 1:
        return narrow(tf.nn.softmax_cross_entropy_with_logits(wide(labels), logits))
    labels = tf.cast(tf.reshape(labels, [-1]), tf.int64)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
    return narrow(tf.where(labels < 0, tf.zeros_like(loss), loss))
