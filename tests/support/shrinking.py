"""Small data and a trained teacher for the search within a budget: rows of numbers of three classes."""

import keras
import numpy as np

CLASSES, FEATURES = 3, 6


def write_rows(folder, train=480, test=200, spread=1.5):
    """Writes `rows.npz` and `teacher.keras`; returns their paths."""
    random = np.random.default_rng(0)
    centers = 2 * random.normal(size=(CLASSES, FEATURES))

    def part(count):
        labels = random.integers(0, CLASSES, count)
        return (centers[labels] + spread * random.normal(size=(count, FEATURES))).astype("float32"), labels

    (x_train, y_train), (x_test, y_test) = part(train), part(test)
    data = folder / "rows.npz"
    np.savez(data, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((FEATURES,))
    hidden = keras.layers.Dense(32, activation="relu")(inputs)
    teacher = keras.Model(inputs, keras.layers.Dense(CLASSES)(hidden), name="teacher")
    teacher.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    teacher.fit(x_train, y_train, epochs=10, batch_size=16, verbose=0)
    teacher.save(folder / "teacher.keras")
    return data, folder / "teacher.keras"
