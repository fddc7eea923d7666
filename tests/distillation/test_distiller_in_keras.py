"""`Distiller` as a Keras model: saved and loaded, every kind of data, every way to run a step, stock callbacks."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.dense_models import X, Y, compiled, dense, values_of

from kdistill.distillation.distiller import Distiller
from kdistill.errors import InputError


def teacher_with_state():
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(4)])


@pytest.mark.slow
def test_the_teacher_is_byte_identical_after_fit_untracked_and_not_saved(tmp_path):
    teacher, student = teacher_with_state(), dense(1)
    before = [v.tobytes() for v in values_of(teacher)]
    distiller = compiled(student, teacher)
    distiller.fit(X, Y, epochs=2, verbose=0)
    distiller.evaluate(X, Y, verbose=0)
    assert [v.tobytes() for v in values_of(teacher)] == before
    assert len(distiller.trainable_weights) == len(student.trainable_weights)
    assert not {id(v) for v in distiller.variables} & {id(v) for v in teacher.variables}
    distiller.save(tmp_path / "distiller.keras")
    distiller.save_weights(tmp_path / "distiller.weights.h5")
    import h5py

    with h5py.File(tmp_path / "distiller.weights.h5") as file:
        sizes = []
        file.visititems(lambda _, item: sizes.append(item.size) if isinstance(item, h5py.Dataset) else None)
    assert sum(sizes) < student.count_params() * 2 + 20


@pytest.mark.slow
def test_a_saved_distiller_goes_on_where_it_stopped(tmp_path):
    def fresh():
        distiller = Distiller(dense(1), dense(2), distillation_weight=0.5, temperature=3.0)
        distiller.compile(keras.optimizers.SGD(0.1, momentum=0.9))
        return distiller

    straight, first = fresh(), fresh()
    straight.fit(X, Y, epochs=4, shuffle=False, verbose=0)
    first.fit(X, Y, epochs=2, shuffle=False, verbose=0)
    first.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    assert (loaded.distillation_weight, loaded.temperature) == (0.5, 3.0)
    with pytest.raises(InputError, match="set_teacher"):
        loaded.evaluate(X, Y, verbose=0)
    loaded.set_teacher(dense(2))
    loaded.fit(X, Y, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(straight.student.weights, loaded.student.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert int(loaded.global_step) == 8


def test_a_saved_schedule_is_rebuilt(tmp_path):
    schedule = keras.optimizers.schedules.CosineDecay(0.8, 10)
    distiller = compiled(dense(1), dense(2), temperature=schedule, distillation_weight=0.4)
    distiller.save(tmp_path / "d.keras")
    loaded = keras.models.load_model(tmp_path / "d.keras")
    assert loaded.temperature == pytest.approx(0.8) and loaded.distillation_weight == pytest.approx(0.4)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(16 * index, 16 * index + 16)
        return X[part], Y[part]


@pytest.mark.slow
def test_arrays_tf_data_and_pydataset_give_the_same_weights():
    sources = [
        ((X, Y), {"batch_size": 16}),
        ((tf.data.Dataset.from_tensor_slices((X, Y)).batch(16),), {}),
        ((Batches(),), {}),
    ]
    ends = []
    for given, options in sources:
        distiller = compiled(dense(1), dense(2))
        distiller.fit(*given, epochs=2, shuffle=False, verbose=0, **options)
        ends.append(distiller.student.get_weights())
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"steps_per_execution": 2}, {"run_eagerly": True}, {"jit_compile": True}])
def test_every_way_to_run_a_step_gives_the_same_weights(options):
    plain, other = compiled(dense(1), dense(2)), Distiller(dense(1), dense(2))
    other.compile(keras.optimizers.SGD(0.1), **options)
    for model in (plain, other):
        model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(plain.student.weights, other.student.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_stock_callbacks(tmp_path):
    distiller = compiled(dense(1), dense(2))
    distiller.fit(
        X,
        Y,
        validation_data=(X, Y),
        epochs=3,
        verbose=0,
        callbacks=[
            keras.callbacks.EarlyStopping("val_kd", mode="min", patience=1, restore_best_weights=True),
            keras.callbacks.ModelCheckpoint(
                tmp_path / "best.keras", monitor="val_agreement", mode="max", save_best_only=True
            ),
            keras.callbacks.ReduceLROnPlateau("val_loss"),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
            keras.callbacks.TensorBoard(tmp_path / "logs"),
        ],
    )
    assert (tmp_path / "best.keras").exists()
    assert "val_agreement" in (tmp_path / "log.csv").read_text()
