"""Students of one architecture share one trace: a function of their variables, called once for each student.

To trace a step takes seconds, and TensorFlow optimizes each trace: 51 students with a trace of their own take minutes
until their first step ends.
"""

import json
from collections.abc import Callable

import keras
import tensorflow as tf

from kdistill.distillation.supervised import Supervised
from kdistill.networks.copying import architecture_of
from kdistill.networks.keras_internals import calls_its_graph, stand_in
from kdistill.training.checkpoint import state_of
from kdistill.training.optimizers import NO_INLINE


class SharedStep:
    """A step `(student, *tensors) -> tensors` that is traced once for all students of the same `signature`.

    Variables are arguments of the trace: it reads and changes those of the student with which it is called, and gives
    the bits that a trace of its own would give.
    """

    def __init__(self, step: Callable):
        self.step, self.traces = step, 0
        self._functions: dict[str, tf.types.experimental.PolymorphicFunction] = {}
        self._signatures: dict[int, str] = {}

    def __call__(self, member: Supervised, *tensors):
        state = state_of(member)
        values = [variable.value for variable in state]
        if id(member) not in self._signatures:
            with tf.init_scope():  # the values of variables, also while a graph is traced
                self._signatures[id(member)] = signature(member)
        name = self._signatures[id(member)]
        if name not in self._functions:
            function = self._function(member, state)
            if function.get_concrete_function(values, *tensors).captured_inputs:
                # It uses something besides its arguments, such as a variable that a layer hides from Keras, or a
                # teacher of its own: the trace serves no other student.
                name = self._signatures[id(member)] = f"{name} {id(member)}"
            self._functions[name] = function
        return self._functions[name](values, *tensors)

    def _function(self, member: Supervised, state: list[keras.Variable]):
        def traced(values, *tensors):
            self.traces += 1
            with stand_in(state, values):
                return self.step(member, *tensors)

        # Inlined, the graph would have the operations of every student, each to be optimized again.
        return tf.function(traced, autograph=False, **NO_INLINE)


def signature(member: Supervised) -> str:
    """What the trace of a compiled student depends on: everything but the values of variables.

    Weights and options of the loss, and a learning rate without a schedule, are variables too.
    """
    try:
        if not calls_its_graph(member.student):
            return str(id(member))
        config = {**member.get_config(), "student": architecture_of(member.student), "name": ""}
    except NotImplementedError:  # a subclassed model without a config
        return str(id(member))
    settings = getattr(member, "settings", {})
    for name in settings.keys() & config.keys():
        config[name] = _kind(config[name])
    terms = getattr(member, "terms", {})
    for name, term in config.get("terms", ()):
        if not isinstance(terms[name].loss, str):
            term["loss"] = id(terms[name].loss)
        for values, keys in ((term, ["weight"]), (term["options"], list(term["options"]))):
            values |= {key: _kind(values[key]) for key in keys if f"{name}.{key}" in settings}
    optimizer = member.optimizer.get_config()
    optimizer |= {"name": "", "learning_rate": _kind(optimizer.get("learning_rate"))}
    variables = [(tuple(v.shape), str(v.dtype), v.trainable) for v in state_of(member)]
    losses = ([loss and id(loss) for loss in member.hard_losses], member.heads, member.part_names)
    parts = [type(member).__name__, config, type(member.optimizer).__name__, optimizer, variables, losses]
    return json.dumps(parts, sort_keys=True, default=repr)


def _kind(value):
    """A schedule as it is; in place of a number, which is a variable, nothing."""
    return value if isinstance(value, dict) else None
