"""Which students fit a budget: each is converted untrained, and its file measured. Sizes do not depend on training.

Of every family, depth and resolution the widest one counts that fits. A larger student has more bytes, memory and time,
so that a few conversions find it.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion.build import Built, build, write
from kdistill.conversion.float32 import prepare
from kdistill.data.splits import Splits
from kdistill.errors import InputError
from kdistill.files import temporary_folder
from kdistill.networks import architectures
from kdistill.recipe import Profile, Recipe
from kdistill.recipe.values import as_dict
from kdistill.shrinking.budget import LIMITS, Budget
from kdistill.shrinking.space import Candidate, Family
from kdistill.tflite import flatbuffer, microcontroller
from kdistill.tflite.interpreter import File

EXAMPLES = 16  # for the ranges of an untrained student; they do not change its size
METADATA_MARGIN = 64  # bytes by which the metadata of files of one recipe differ: numbers have more or fewer digits
FIRST_CONTAINER, FIRST_METADATA = 6000, 3500  # bytes, guesses for the first student
BYTES_OF_A_WEIGHT = {"none": 4, "float16": 2, "dynamic": 1, "int8": 1, "int4": 0.5}
METRICS = {"accuracy": 0.123456789012345, "model_accuracy": 0.123456789012345, "agreement": 0.123456789012345}
METRICS |= {"max_difference": 12.34567890123456, "images": 100000}  # with as many digits as they may have


class Ruler:
    """Measures untrained students of a recipe's data as files for a profile; each once.

    Attributes:
        costs: by the name of a candidate: parameters, bytes, container, arena (None for an open batch), microseconds.
    """

    def __init__(self, recipe: Recipe, splits: Splits, profile: Profile, budget: Budget, most: int | None = None):
        self.recipe, self.splits, self.profile, self.budget, self.most = recipe, splits, profile, budget, most
        self.costs: dict[str, dict] = {}
        self._built: dict[str, Built] = {}
        self._counts: dict[str, int] = {}  # of parameters, by the name of a candidate
        self._metadata: int | None = None

    def model(self, candidate: Candidate) -> keras.Model:
        """The student, untrained. Raises `InputError` where its network cannot be built."""
        return architectures.build(candidate.network, self.splits.input_shape, self.splits.sizes)

    def measure(self, candidate: Candidate, exact: bool = False) -> dict:
        """The costs of a candidate. `bytes` is within about 100 bytes, unless `exact`: an upper bound, a bit above."""
        costs = self.costs.get(candidate.name)
        if costs is None:
            costs = self.costs[candidate.name] = self._measure(candidate)
        if exact and not costs["exact"]:
            if candidate.name not in self._built:  # measured by an earlier session
                self._measure(candidate)
            size = self._written_size(self._built[candidate.name])
            costs |= {"bytes": size, "container": costs["container"] + size - costs["bytes"], "exact": True}
        return costs

    def _measure(self, candidate: Candidate) -> dict:
        model = _with_any_weights(self.model(candidate))
        recipe = dataclasses.replace(self.recipe, student=candidate.network)
        about = {"recipe": as_dict(recipe), "data": self.splits.fingerprint}
        calibration = self.splits.train.select(slice(EXAMPLES)).inputs
        names = self.splits.class_names or None
        built = build(prepare(model, self.splits.head), self.profile, calibration, names, about)
        self._built[candidate.name] = built
        if self._metadata is None:
            self._metadata = self._written_size(built) - len(built.content)
        size, parsed = len(built.content) + self._metadata, flatbuffer.parse(built.content)
        return {
            "parameters": model.count_params(),
            "bytes": size,
            "container": size - round(BYTES_OF_A_WEIGHT[self.profile.quantization] * model.count_params()),
            "arena": None if self.profile.batch is None else microcontroller.arena(parsed)["total"],
            "microseconds": _microseconds(built),
            "exact": False,
        }

    def _written_size(self, built: Built) -> int:
        """The bytes of a file with its metadata, which has run in a process of its own."""
        with temporary_folder() as folder:
            try:
                size = write(built, Path(folder, "student.tflite"), lambda part: METRICS)["bytes"]
            except InputError:  # untrained numbers may be such that no kernel takes them, see `_microseconds`
                size = len(built.content) + (self._metadata or FIRST_METADATA)
        return size + METADATA_MARGIN

    def widest(self, family: Family, depth: int, reduce: int) -> Candidate | None:
        """The widest student of this shape that fits; None if none does, or if it cannot be built for the inputs."""
        if self.parameters(Candidate(family, 1, depth, reduce)) is None:
            return None
        if self._is_hopeless(Candidate(family, 1, depth, reduce)):
            return None
        low, high = 0, self._first_too_large(family, depth, reduce)  # low fits, high does not
        width, before = self._first_guess(family, depth, reduce, high), None
        while high - low > 1:
            candidate = Candidate(family, width, depth, reduce)
            costs = self.measure(candidate)
            if self.budget.exceeded(costs):
                high = width
            else:
                low = width
                if self._weights_exceed(Candidate(family, low + 1, depth, reduce), costs):
                    break
            width = min(max(self._guess(candidate, costs, before), low + 1), high - 1)
            before = costs
        return Candidate(family, low, depth, reduce) if low else None

    def _is_hopeless(self, narrowest: Candidate) -> bool:
        """Whether the weights, with half of the smallest container so far, exceed the budget: it need not be
        converted."""
        containers = [costs["container"] for costs in self.costs.values()]
        weights = BYTES_OF_A_WEIGHT[self.profile.quantization] * self._parameters(narrowest)
        return bool(self.budget.max_bytes and containers) and weights + min(containers) / 2 > self.budget.max_bytes

    def _weights_exceed(self, wider: Candidate, costs: dict) -> bool:
        """Whether the additional weights of a wider student alone exceed the budget: it need not be converted."""
        if not self.budget.max_bytes:
            return False
        more = self._parameters(wider) - costs["parameters"]
        return costs["bytes"] + BYTES_OF_A_WEIGHT[self.profile.quantization] * more > self.budget.max_bytes

    def _width_with(self, candidate: Candidate, parameters: float) -> int:
        """The widest student of a candidate's shape that has no more parameters than these."""
        low, high = 0, 2 * candidate.width
        widest = candidate.family.widest
        while high < widest and self._parameters(dataclasses.replace(candidate, width=high)) <= parameters:
            low, high = high, 2 * high
        high = min(high, widest + 1)
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._parameters(dataclasses.replace(candidate, width=middle)) <= parameters
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _first_guess(self, family: Family, depth: int, reduce: int, high: int) -> int:
        """The widest student whose weights fit beside a container such as that of the student measured last."""
        if not self.budget.max_bytes:
            return min(8, high - 1)
        containers = [costs["container"] for costs in self.costs.values()]
        room = self.budget.max_bytes - (containers[-1] if containers else FIRST_CONTAINER)
        low = 1
        while high - low > 1:
            middle = (low + high) // 2
            weights = BYTES_OF_A_WEIGHT[self.profile.quantization]
            fits = weights * self._parameters(Candidate(family, middle, depth, reduce)) <= room
            low, high = (middle, high) if fits else (low, middle)
        return low

    def parameters(self, candidate: Candidate) -> int | None:
        """The number of parameters of a candidate; None if it cannot be built for the inputs."""
        try:
            return self._parameters(candidate)
        except InputError:
            return None

    def _parameters(self, candidate: Candidate) -> int:
        if candidate.name not in self._counts:
            self._counts[candidate.name] = self.model(candidate).count_params()
        return self._counts[candidate.name]

    def _first_too_large(self, family: Family, depth: int, reduce: int) -> int:
        """The first width whose student has more parameters than the teacher, or weights that exceed the budget."""
        most = math.inf if self.most is None else self.most
        if self.budget.max_bytes:
            most = min(most, self.budget.max_bytes / BYTES_OF_A_WEIGHT[self.profile.quantization])
        low, high = 1, family.widest + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._parameters(Candidate(family, middle, depth, reduce)) <= most
            low, high = (middle, high) if fits else (low, middle)
        return high

    def _guess(self, candidate: Candidate, costs: dict, before: dict | None) -> int:
        """The width at which the tightest limit is reached, if bytes grow with weights, and memory with the width.

        `before`: the costs of another width, which show how many bytes a weight takes with its scales.
        """
        width, guesses, weight = candidate.width, [], BYTES_OF_A_WEIGHT[self.profile.quantization]
        more = costs["parameters"] - before["parameters"] if before else 0
        if more:
            weight = max(weight, (costs["bytes"] - before["bytes"]) / more)
        for name, cost in LIMITS.items():
            limit = getattr(self.budget, name)
            if limit and cost == "bytes":
                wanted = costs["parameters"] + (limit - costs["bytes"]) / weight
                guesses.append(self._width_with(candidate, wanted))
            elif limit and costs[cost]:
                guesses.append(width * limit / costs[cost])
        return int(min(guesses, default=width - 1))


def _microseconds(built: Built) -> float | None:
    """The time of a file; None if it does not run.

    Untrained, a channel may give nothing but zeros, for which int8 kernels have no scale. Training changes that.
    """
    with temporary_folder() as folder:
        path = Path(folder, "student.tflite")
        path.write_bytes(built.content)
        try:
            return File(path, trusted=True).latency()["median_us"]
        except InputError:
            return None


def fitting(
    ruler: Ruler, families: list[Family], say: Callable[[str], None] = print
) -> tuple[list[Candidate], list[Candidate]]:
    """The widest students that fit, the largest first; and the narrowest of every shape, if none fits.

    Students that take the same weights, as a depth that an image is too small for, count once.
    """
    candidates, narrowest, hopeless = [], [], []
    for family in families:
        for depth in family.depths:
            for reduce in family.reductions:
                candidate = ruler.widest(family, depth, reduce)
                while candidate and ruler.budget.exceeded(ruler.measure(candidate, exact=True)):
                    candidate = Candidate(family, candidate.width - 1, depth, reduce) if candidate.width > 1 else None
                if candidate:
                    costs = ruler.costs[candidate.name]
                    say(f"  {candidate.name}: {describe(costs)}")
                    candidates.append(candidate)
                else:
                    least = Candidate(family, 1, depth, reduce)
                    (narrowest if least.name in ruler.costs else hopeless).append(least)
    if not candidates:  # the message names the nearest, which may not have been converted
        counts = {least: count for least in hopeless if (count := ruler.parameters(least)) is not None}
        smallest = min(counts, key=counts.get, default=None)
        if smallest and all(counts[smallest] < ruler.costs[one.name]["parameters"] for one in narrowest):
            ruler.measure(smallest)
            narrowest.append(smallest)
    return sorted(candidates, key=lambda one: -ruler.costs[one.name]["parameters"]), narrowest


def describe(costs: dict) -> str:
    """The costs of a student in words."""
    arena = f", arena {costs['arena']:,}" if costs["arena"] else ""
    time = f", {costs['microseconds']:.0f} µs" if costs["microseconds"] else ""
    return f"{costs['parameters']:,} parameters, {costs['bytes']:,} bytes{arena}{time}"


def refusal(ruler: Ruler, narrowest: list[Candidate]) -> str:
    """Why nothing fits: the smallest that would, and what it costs."""
    if not narrowest:
        return "No family can be built for these inputs. Give a function of your own: --student FILE.py:FUNCTION."
    limits = [name for name in LIMITS if getattr(ruler.budget, name)]

    def excess(candidate: Candidate) -> float:
        costs = ruler.costs[candidate.name]
        return max((costs[LIMITS[name]] or math.inf) / getattr(ruler.budget, name) for name in limits)

    best = min(narrowest, key=excess)
    costs = ruler.measure(best, exact=True)
    too_much = ruler.budget.exceeded(costs) or limits
    advice = " and ".join(f"--{name.replace('_', '-')} {math.ceil(costs[LIMITS[name]] or 0)}" for name in too_much)
    container = f" {costs['container']:,} of its bytes are the container: graph, scales, metadata." * (
        "max_bytes" in too_much
    )
    return (
        f"No student meets the budget of {ruler.budget.text()} for '{ruler.profile.name}'. The nearest is {best.name}: "
        f"{describe(costs)}.{container} It needs {advice}, and so narrow a student learns little; nothing was trained."
    )


def _with_any_weights(model: keras.Model) -> keras.Model:
    """A model as large as a trained one: the converter stores equal constants, such as biases of 0, once."""
    random = np.random.default_rng(0)
    for variable in model.variables:
        values = np.asarray(variable)
        if np.issubdtype(values.dtype, np.floating) and values.size and np.ptp(values) == 0:
            variable.assign(values + 0.1 * np.abs(random.standard_normal(values.shape)))
    return model
