"""Several teachers blended into one Keras model, which is saved and evaluated like any other."""

from collections.abc import Sequence

import keras

from kdistill.teachers.frozen import frozen


@keras.saving.register_keras_serializable(package="kdistill")
class Blend(keras.layers.Layer):
    """Images -> logits of the blend: the log of the weighted mean of several models' probabilities. No gradient."""

    def __init__(self, models: Sequence[keras.Model], shares: Sequence[float] | None = None, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.models, self.shares = list(models), None if shares is None else list(shares)
        self.built = True

    def call(self, images):
        return frozen(list(self.models), self.shares)(images)

    def get_config(self):
        models = [keras.saving.serialize_keras_object(model) for model in self.models]
        return {"name": self.name, "models": models, "shares": self.shares}

    @classmethod
    def from_config(cls, config):
        models = [keras.saving.deserialize_keras_object(model) for model in config.pop("models")]
        return cls(models, **config)


def blend_models(models: Sequence[keras.Model], shares: Sequence[float] | None = None) -> keras.Model:
    """One model of several (Geras et al. 2016, arXiv 1511.06433), computed by `teachers.frozen.frozen`.

    Args:
        models: Keras models of the same images and classes.
        shares: their positive weights in the mean. None: equal weights.
    """
    image = keras.Input(models[0].input_shape[1:], name="image")
    return keras.Model(image, Blend(models, shares, name="blend")(image), name="blend")
