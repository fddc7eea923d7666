"""The replicas and workers of a training step: how many there are, and sums over all of them."""

import tensorflow as tf


def several_workers(strategy: tf.distribute.Strategy | None = None) -> bool:
    """Whether several processes train together, in a strategy or the current one."""
    return isinstance(strategy or tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)


def replica_count() -> int:
    """The number of replicas of the current strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """The sum of a value of each replica, on every one of them; called inside of a step."""
    if replica_count() == 1:
        return value
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)
