"""The optimizer and learning rate of a recipe; Keras's Adam and SGD with one fused operation for each weight.

Keras updates each weight with some 30 small operations; for a small network on a CPU they take a tenth of the step.
TensorFlow's own kernels compute the same (see the tests). Keras's own update serves several replicas, sparse gradients
and weights that are not float32.
"""

import keras
import tensorflow as tf

from kdistill.networks.keras_internals import moments_of, momentum_of
from kdistill.recipe import Training

# A call of such a function stays a call: TensorFlow does not merge its operations with those around it.
NO_INLINE = {"experimental_attributes": {"_noinline": True}}


def scheduled_optimizer(training: Training, steps: int, apart: bool = False) -> keras.Optimizer:
    """The optimizer that `training` names, with its learning rate scheduled over `steps` steps in total.

    Biases and the parameters of normalization do not decay. `apart`: see `Apart`.
    """
    rate, decay = learning_rate(training, steps), training.weight_decay or None
    if apart and isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = Apart(rate)
    if training.optimizer == "sgd":
        optimizer = SGD(rate, momentum=training.momentum, weight_decay=decay)
    else:
        optimizer = Adam(rate, weight_decay=decay)
    if decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def learning_rate(training: Training, steps: int) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """A number, or a Keras schedule: a linear warm-up over a share of the steps, then a cosine to zero or a constant;
    or one drop (`step`)."""
    rate, warmup = training.learning_rate, round(training.warmup * steps)
    if training.schedule == "step":
        last = max(0, round(training.drop_at * steps) - 1)  # the last step at the first rate
        return keras.optimizers.schedules.PiecewiseConstantDecay([last], [rate, rate * training.drop_factor])
    constant = training.schedule == "constant"
    if constant and not warmup:
        return rate
    start, target = (0.0, rate) if warmup else (rate, None)
    return keras.optimizers.schedules.CosineDecay(
        start, max(1, steps - warmup), alpha=1.0 if constant else 0.0, warmup_target=target, warmup_steps=warmup
    )


class Apart(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that has the same bits in every graph, those of Keras's `fit`.

    TensorFlow merges the constants of a schedule with those around it. Then the rate differs in its last bit, and after
    some hundred steps the weights differ visibly.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule):
        self.schedule = schedule
        self.traced = tf.function(lambda step: schedule(step), autograph=False, **NO_INLINE)

    def __call__(self, step):
        return (self.schedule if tf.executing_eagerly() else self.traced)(tf.convert_to_tensor(step))

    def get_config(self):
        return {"schedule": keras.saving.serialize_keras_object(self.schedule)}


def _is_fusible(gradient, variable) -> bool:
    return (
        isinstance(gradient, tf.Tensor)
        and tf.as_dtype(variable.dtype) == tf.as_dtype(gradient.dtype) == tf.float32
        and not tf.distribute.has_strategy()
    )


def _handle(variable) -> tf.Tensor:
    return (variable.value if isinstance(variable, keras.Variable) else variable).handle


@keras.saving.register_keras_serializable(package="kdistill")
class Adam(keras.optimizers.Adam):
    """Adam (Kingma and Ba 2014, arXiv 1412.6980); AdamW with `weight_decay`. Arguments as in Keras."""

    def update_step(self, gradient, variable, learning_rate):
        if self.amsgrad or not _is_fusible(gradient, variable):
            return super().update_step(gradient, variable, learning_rate)
        momentum, velocity = moments_of(self, variable)
        step = tf.cast(tf.convert_to_tensor(self.iterations) + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=_handle(variable),
            m=_handle(momentum),
            v=_handle(velocity),
            beta1_power=tf.pow(tf.constant(self.beta_1, tf.float32), step),
            beta2_power=tf.pow(tf.constant(self.beta_2, tf.float32), step),
            lr=tf.cast(learning_rate, tf.float32),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


@keras.saving.register_keras_serializable(package="kdistill")
class SGD(keras.optimizers.SGD):
    """Gradient descent with momentum. Arguments as in Keras."""

    def update_step(self, gradient, variable, learning_rate):
        if not _is_fusible(gradient, variable):
            return super().update_step(gradient, variable, learning_rate)
        rate = tf.cast(learning_rate, tf.float32)
        if not self.momentum:
            tf.raw_ops.ResourceApplyGradientDescent(var=_handle(variable), alpha=rate, delta=gradient)
            return
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=_handle(variable),
            accum=_handle(momentum_of(self, variable)),
            lr=rate,
            grad=gradient,
            momentum=self.momentum,
            use_nesterov=self.nesterov,
        )
