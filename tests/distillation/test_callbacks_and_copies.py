"""Callbacks of Keras without a `mode`, and what copies and exported files of a `Distiller` keep."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.dense_models import X, Y, dense

from kdistill.distillation.distiller import Distiller
from kdistill.recipe import Term

ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def eager(model, **options):
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True, **options)
    return model


# -- callbacks --------------------------------------------------------------------------------------------------------


class Play(keras.callbacks.Callback):
    """Replaces what was logged by other numbers, so that the direction of the callbacks after it shows."""

    def __init__(self, monitor, values):
        super().__init__()
        self.monitor, self.values = monitor, values

    def on_epoch_end(self, epoch, logs=None):
        logs[self.monitor] = self.values[epoch]


@pytest.mark.slow
@pytest.mark.parametrize(
    "monitors,values",
    [
        (["accuracy", "val_accuracy", "val_agreement", "agreement"], [0.1, 0.2, 0.3, 0.3, 0.3, 0.2]),
        (["loss", "val_loss", "val_kd", "hard", "val_hint"], [0.3, 0.2, 0.1, 0.1, 0.1, 0.2]),
    ],
    ids=["rates are better when they rise", "losses are better when they fall"],
)
def test_callbacks_without_a_mode_know_the_direction(monitors, values, tmp_path):
    """The best epoch for EarlyStopping, the epochs of the saved files, and what each ReduceLROnPlateau did."""
    distiller = eager(Distiller(dense(1), dense(2), terms={"hint": Term("cosine")}))
    callbacks, watching = [], {}
    for monitor in monitors:
        stop = keras.callbacks.EarlyStopping(monitor, patience=3, restore_best_weights=True)
        plateau = keras.callbacks.ReduceLROnPlateau(monitor, factor=0.5, patience=2, min_delta=0)
        save = keras.callbacks.ModelCheckpoint(
            tmp_path / f"{monitor}-{{epoch}}.weights.h5", monitor, save_best_only=True, save_weights_only=True
        )
        callbacks += [Play(monitor, values), plateau, save, stop]
        watching[monitor] = stop, plateau
    history = distiller.fit(X[:8], Y[:8], validation_data=(X[:8], Y[:8]), epochs=6, verbose=0, callbacks=callbacks)
    assert len(history.epoch) == 6
    for monitor, (stop, plateau) in watching.items():
        assert stop.best_epoch == 2 and plateau.best == values[2], monitor
        assert {path.name for path in tmp_path.glob(f"{monitor}-*")} == {
            f"{monitor}-{epoch}.weights.h5" for epoch in (1, 2, 3)
        }
    assert float(distiller.optimizer.learning_rate) == pytest.approx(0.1 * 0.5 ** len(monitors))  # once for each


def test_a_mode_of_the_user_and_the_names_of_metrics_stay():
    callbacks = [
        keras.callbacks.EarlyStopping("val_accuracy", mode="min"),
        keras.callbacks.EarlyStopping("val_top2", patience=9),
    ]
    distiller = eager(Distiller(dense(1), dense(2)), metrics=[keras.metrics.SparseTopKCategoricalAccuracy(2, "top2")])
    distiller.fit(
        X,
        Y,
        validation_data=(X, Y),
        verbose=0,
        callbacks=keras.callbacks.CallbackList(callbacks, add_history=True, model=distiller),
    )
    assert [callback.mode for callback in callbacks] == ["min", "auto"]
    assert [callback.monitor_op for callback in callbacks] == [keras.ops.less, keras.ops.greater]  # Keras's own choice
    with pytest.raises(ValueError, match="monitor=val_nothing"):
        distiller.fit(X, Y, verbose=0, callbacks=[keras.callbacks.EarlyStopping("val_nothing")])


# -- copies and files -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("copy", ["clone", "config", "json", "pickle"])
def test_copies_keep_every_setting(copy):
    schedule = keras.optimizers.schedules.CosineDecay(0.8, 10)
    terms = {"hint": Term("dkd", 0.7, options={"beta": 2.0})}
    original = Distiller(
        dense(1),
        [dense(2), dense(3)],
        teacher_weights=[2, 1],
        distillation_weight=schedule,
        temperature=2.0,
        terms=terms,
        dtype="mixed_bfloat16",
        name="mine",
    )
    original.compile(keras.optimizers.Adam(0.02), ENTROPY, loss_weights=2.0, run_eagerly=True)
    original.optimizer.build(original.trainable_variables)
    original.temperature = 3.0
    original.set_term("hint", beta=5.0)
    again = {
        "clone": lambda: keras.models.clone_model(original),
        "config": lambda: Distiller.from_config(original.get_config()),
        "json": lambda: keras.models.model_from_json(original.to_json()),
        "pickle": lambda: pickle.loads(pickle.dumps(original)),
    }[copy]()
    assert again.settings == original.settings
    assert again.settings["temperature"] == 3.0 and again.settings["hint.beta"] == 5.0
    assert own_config(again) == own_config(original)
    assert (again.name, again.dtype_policy.name) == ("mine", "mixed_bfloat16")
    if copy != "config":  # as in Keras
        assert again.get_compile_config() == original.get_compile_config()
        again.set_teacher([dense(2), dense(3)])
        original.student.set_weights(again.student.get_weights())
        logs = [model.evaluate(X[:16], Y[:16], verbose=0, return_dict=True) for model in (again, original)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def own_config(model):
    return {name: value for name, value in model.get_config().items() if name != "student"}


def test_a_copy_with_a_term_named_kd_has_no_temperature():
    original = Distiller(dense(1), dense(2), distillation_weight=0.3, terms={"kd": Term("mse_logits")})
    again = keras.models.clone_model(original)
    assert again.settings == original.settings and "temperature" not in again.settings


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequential", "subclassed"])
def test_export_is_that_of_the_student(kind, tmp_path):
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.last = keras.layers.Dense(4)

        def call(self, x):
            return self.last(x)

    student = dense(1) if kind == "sequential" else Subclassed()
    distiller = eager(Distiller(student, dense(2)))
    distiller.fit(X, Y, verbose=0)
    distiller.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(X), distiller.predict(X, verbose=0), atol=1e-6)
    assert len(loaded.variables) == len(student.weights)
