"""The ranges of a float file's activations on examples, from which an int8 file gets its scales.

The converter takes the smallest and the largest number of every tensor, so that one outlier makes the steps of all
other numbers coarse. Other ranges cut outliers off.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kdistill.tflite import flatbuffer
from kdistill.tflite.interpreter import open_interpreter, operator_details, signature_names

EXTREMES, SQUARED_ERROR = "extremes", "squared error"
SHARES = {"0.1 %": 0.001, "1 %": 0.01}  # of the numbers that such a range cuts off at each end
KINDS = (EXTREMES, SQUARED_ERROR, *SHARES)
BINS = 8192
LEVELS = 255  # steps of int8
FACTORS = np.geomspace(1.0, 1e-3, 61)  # of an end of the range that are tried
Batches = Callable[[], Iterable[dict[str, np.ndarray]]]  # the examples by the names of the inputs, as often as called


@dataclass
class Activation:
    """The numbers of one float tensor over all examples.

    `largest`: the largest absolute value by channel, `[channels]`. `counts`: of all numbers but 0 in `BINS` bins from
    `low` to `high`. `zeros`: how many are 0, which int8 stores exactly.
    """

    low: float = np.inf
    high: float = -np.inf
    largest: np.ndarray = field(default_factory=lambda: np.zeros(1))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    zeros: int = 0

    def extend(self, values: np.ndarray) -> None:
        """Takes the numbers of a batch into `low`, `high` and `largest`."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        rows = np.abs(values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1))
        self.largest = np.maximum(self.largest, rows.max(axis=0))

    def count(self, values: np.ndarray) -> None:
        """Takes the numbers of a batch into `counts` and `zeros`."""
        self.zeros += int((values == 0).sum())
        if self.high > self.low:
            self.counts += np.histogram(values[values != 0], BINS, (self.low, self.high))[0]


def activations_of(content: bytes, batches: Batches, distributions: bool = True) -> dict[int, Activation]:
    """The activations of a float file, by the index of the tensor; with `distributions` also how they are distributed.

    The numbers of the inputs count as activations, too.
    """
    runner = _Runner(content)
    activations = {index: Activation() for index in runner.tensors}
    for batch in batches():
        for index, values in runner.run(batch):
            activations[index].extend(values)
    if distributions:
        for batch in batches():
            for index, values in runner.run(batch):
                activations[index].count(values)
    return activations


def set_ranges(model: schema.ModelT, activations: dict[int, Activation], kind: str) -> None:
    """Writes the ranges of activations into a calibrated model, in place of those that it has.

    Inputs keep their extremes: a pixel that is cut off is lost.
    """
    graph = model.subgraphs[0]
    inputs = {int(index) for index in graph.inputs}
    for index, activation in activations.items():
        quantization = graph.tensors[index].quantization
        if quantization is None or quantization.min is None or not len(quantization.min):
            continue
        low, high = range_of(activation, EXTREMES if index in inputs else kind)
        quantization.min, quantization.max = np.asarray([low], np.float32), np.asarray([high], np.float32)


def range_of(activation: Activation, kind: str) -> tuple[float, float]:
    """The range `(low, high)` of one of `KINDS`; zero is always inside."""
    low, high = min(activation.low, 0.0), max(activation.high, 0.0)
    if kind == EXTREMES or not activation.counts.sum():
        return low, high
    edges = np.linspace(activation.low, activation.high, BINS + 1)
    if kind in SHARES:
        return _percentiles(activation, edges, SHARES[kind], low, high)
    centers = (edges[:-1] + edges[1:]) / 2

    def error(ends: tuple[float, float]) -> float:
        return _squared_error(activation.counts, centers, *ends)

    ends = low, high
    for _ in range(2):  # the best of one end depends on the other
        ends = min(((low * factor, ends[1]) for factor in FACTORS), key=error)
        ends = min(((ends[0], high * factor) for factor in FACTORS), key=error)
    return ends


def _squared_error(counts: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    """The sum of squared differences between the numbers and their int8 versions with this range."""
    if high <= low:
        return float(np.sum(counts * centers**2))
    cut_off = centers - np.clip(centers, low, high)
    inside = counts[cut_off == 0].sum()
    return float(inside * ((high - low) / LEVELS) ** 2 / 12 + np.sum(counts * cut_off**2))


def _percentiles(
    activation: Activation, edges: np.ndarray, cut_off: float, low: float, high: float
) -> tuple[float, float]:
    counts = activation.counts.copy()
    zero = int(np.clip(np.searchsorted(edges, 0.0, "right") - 1, 0, BINS - 1))
    counts[zero] += activation.zeros
    share = np.cumsum(counts) / counts.sum()
    first, last = int(np.argmax(share > cut_off)), int(np.argmax(share >= 1 - cut_off))
    return max(low, min(float(edges[first]), 0.0)), min(high, max(float(edges[last + 1]), 0.0))


class _Runner:
    """Runs a float file and reads every float tensor of it: `tensors`, indices."""

    def __init__(self, content: bytes):
        self._interpreter = open_interpreter(content, delegates=False, keep_tensors=True)
        names = signature_names(self._interpreter)
        self._inputs = {names[end["index"]]: end for end in self._interpreter.get_input_details()}
        self._batch = None
        graph = flatbuffer.parse(content).subgraphs[0]
        ends = {end["index"] for end in self._inputs.values()}
        computed = {int(i) for operator in operator_details(self._interpreter) for i in operator["outputs"]}
        self.tensors = sorted(
            i
            for i in ends | computed
            if 0 <= i < len(graph.tensors) and flatbuffer.type_name(graph.tensors[i]) == "float32"
        )

    def run(self, batch: dict[str, np.ndarray]):
        """The tensors for a batch of examples: pairs of index and values."""
        size = len(next(iter(batch.values())))
        if size != self._batch:
            for end in self._inputs.values():
                self._interpreter.resize_tensor_input(end["index"], [size, *end["shape"][1:]])
            self._interpreter.allocate_tensors()
            self._batch = size
        for name, end in self._inputs.items():
            self._interpreter.set_tensor(end["index"], batch[name].astype(end["dtype"]))
        self._interpreter.invoke()
        for index in self.tensors:
            values = self._interpreter.get_tensor(index)
            if values.size:
                yield index, values
