"""The networks of a recipe for the data of a run: loaded from a file, or built with the start of a seed."""

import keras

from kdistill.data.splits import Splits
from kdistill.errors import InputError
from kdistill.networks import applications, architectures, saving, weights
from kdistill.recipe import Network
from kdistill.training.strategy import Devices


def needs_training(network: Network, classes: int) -> bool:
    """Whether a teacher has to be trained: it comes neither from a file nor with trained weights."""
    return not (network.file or network.weights or applications.is_pretrained(network.options, classes))


def load_network(network: Network, splits: Splits, devices: Devices) -> keras.Model:
    """The model in the `.keras` file of a teacher, checked to fit the images and classes."""
    with devices.scope():
        return saving.load_checked(network.file, splits.train.images.shape[1:], len(splits.class_names))


def build_network(
    network: Network, splits: Splits, seed: int, devices: Devices, download: bool = False
) -> tuple[keras.Model, dict | None]:
    """A network with the random start that belongs to a seed, or with the weights of the files that it names.

    Returns the network, and of files what `weights.load` reports, else None. Raises `InputError` for a network, option
    or file that does not fit, and if no layer has received weights.
    """
    keras.utils.set_random_seed(seed)
    with devices.scope():
        model = architectures.build(network, splits.train.images.shape[1:], len(splits.class_names), download)
        if not network.weights:
            return model, None
        mappings = network.mapping if len(network.weights) > 1 else {network.weights[0]: network.mapping}
        loaded = weights.load(model, [(file, mappings.get(file) or None) for file in network.weights])
    if not loaded["loaded"]:
        raise InputError(
            f"No layer of '{network.name}' has the name of a layer of {', '.join(network.weights)}. Give the network a "
            "mapping, {layer of the file: layer of the network}."
        )
    return model, loaded
