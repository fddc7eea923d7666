"""Files that repair chooses among: each built in another way, and compared with the Keras model on training examples.

The choice is made on training examples, so that the examples of the check see few files: one for each way.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kdistill.conversion.build import Built, build, calibration_of, evenly_spaced
from kdistill.conversion.comparison import compare_heads
from kdistill.conversion.float32 import Prepared
from kdistill.conversion.graph import layer_names, layer_of
from kdistill.conversion.tflite_converter import USUAL, Tuning
from kdistill.conversion.verify import SECONDS, layer_costs, logits_of, outputs_to_compare
from kdistill.errors import InputError
from kdistill.evaluation.metrics import log_softmax
from kdistill.evaluation.outputs import by_head
from kdistill.files import temporary_folder
from kdistill.recipe import Profile
from kdistill.tflite.interpreter import File, predict_isolated

SAMPLE = 256  # training examples on which candidates are compared
COUNTS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # of layers that are kept in float


@dataclass(frozen=True)
class Case:
    """A student for a profile: what every candidate is built of. The other fields are those of `export`."""

    student: Prepared
    profile: Profile
    calibration: object
    class_names: object = None
    about: dict | None = None
    _reference: list = field(default_factory=list, repr=False)

    def built(self, tuning: Tuning) -> Built:
        """The file that a tuning gives. Raises `InputError`."""
        return build(self.student, self.profile, self.calibration, self.class_names, self.about, tuning)

    def sample(self):
        """Training examples: an array, or of other inputs a dict by name."""
        if self.profile.quantization == "int8":
            sample = calibration_of(self.student, self.profile, self.calibration, SAMPLE)
        elif self.student.takes_images:
            sample = evenly_spaced(self.calibration, SAMPLE)
        else:
            return outputs_to_compare(self.student, self.profile, self.calibration, "calibration", SAMPLE)[1]
        return sample if isinstance(sample, Mapping) else sample[:]

    def reference(self) -> tuple:
        """What the Keras model gives for the sample, as its file would give it, and the sample."""
        if not self._reference:
            sample = self.sample()
            if self.student.classifies_images:
                self._reference.append((logits_of(self.student, self.profile, sample), sample))
            else:
                compared = outputs_to_compare(self.student, self.profile, self.calibration, "calibration", SAMPLE)
                self._reference.append(compared[:2])
        return self._reference[0]


@dataclass(frozen=True)
class Candidate:
    """A file, and how far it is from the Keras model on the sample.

    `error`: the share of noise in the power of an example's outputs, 0 to 1, its mean over examples, so that no outlier
    outweighs the others; infinite for a file that does not run. `agreement`: as in the check.
    """

    tuning: Tuning
    built: Built
    error: float
    agreement: float


def candidate(case: Case, tuning: Tuning) -> Candidate:
    """Builds and measures a file. Raises `InputError` where the converter refuses the tuning."""
    built = case.built(tuning)
    with temporary_folder() as folder:
        path = Path(folder, "candidate.tflite")
        path.write_bytes(built.content)
        try:
            error, agreement = _distance(case, built, path)
        except InputError:
            error, agreement = np.inf, 0.0
    return Candidate(tuning, built, error, agreement)


def best_of(case: Case, tunings: Iterable[Tuning]) -> Candidate | None:
    """The candidate that is nearest to the Keras model; None if the converter refuses all of them."""
    candidates = []
    for tuning in dict.fromkeys(tunings):
        try:
            candidates.append(candidate(case, tuning))
        except InputError:
            continue
    return min(candidates, key=lambda one: one.error, default=None)


def _distance(case: Case, built: Built, path: Path) -> tuple[float, float]:
    expected, inputs = case.reference()
    if case.student.classifies_images:
        received = predict_isolated(path, inputs, SECONDS)
        if File(path, trusted=True).probabilities:
            expected = np.exp(log_softmax(expected))
        pairs = [(received, expected)]
        agreement = float(np.mean(received.argmax(axis=1) == expected.argmax(axis=1)))
    else:
        if len(inputs) == 1:
            inputs = {File(path, trusted=True).input["name"]: next(iter(inputs.values()))[:]}
        outputs = by_head(predict_isolated(path, inputs, SECONDS), built.heads)
        expected = dict(zip(built.heads, expected.values(), strict=True))
        pairs = [(outputs[name], expected[name]) for name in built.heads]
        if not all(np.isfinite(received).all() for received, _ in pairs):
            return np.inf, 0.0
        agreement = compare_heads(outputs, expected, built.heads, {}, case.profile)["agreement"]
    return float(np.mean([_error(*pair) for pair in pairs])), agreement


def _error(received: np.ndarray, expected: np.ndarray) -> float:
    if received.shape != expected.shape or not np.isfinite(received).all():
        return np.inf
    received, expected = (part.reshape(len(part), -1).astype(np.float64) for part in (received, expected))
    noise = np.sum((received - expected) ** 2, axis=1)
    signal = np.sum((expected - np.median(expected, axis=0)) ** 2, axis=1)
    return float(np.mean(noise / (noise + signal + np.median(signal) + 1e-30)))


def costly_layers(case: Case, tuning: Tuning) -> list[tuple[str, tuple[str, ...]]]:
    """The layers in which a file loses, those that cost most first: their names, and the tensors that they give.

    Empty where the costs cannot be measured: with several inputs.
    """
    if case.profile.quantization == "int8":  # so that the output has the name that it has in the float file
        case = replace(case, profile=replace(case.profile, input_type="int8", output_type="int8"))
    built = case.built(replace(tuning, equalized=False))  # equalized channels differ from those of the float file
    with temporary_folder() as folder:
        path = Path(folder, "candidate.tflite")
        path.write_bytes(built.content)
        rows = layer_costs(case.student, built, path, case.sample())
    names, layers = layer_names(case.student.model), {}
    for row in rows:
        name = layer_of(row["tensor"], names) or ("the output" if ":" in row["tensor"] else row["tensor"])
        cost, tensors = layers.get(name, (0.0, ()))
        layers[name] = cost + row["cost"], (*tensors, row["tensor"])
    ordered = sorted(layers.items(), key=lambda item: -item[1][0])
    return [(name, tensors) for name, (_, tensors) in ordered]


def usual_or(tuning: Tuning) -> tuple[Tuning, ...]:
    """The usual tuning and another one, once each."""
    return tuple(dict.fromkeys((USUAL, tuning)))
