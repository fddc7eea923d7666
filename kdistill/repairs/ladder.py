"""The ways in which a file that loses too much is made anew, in their order, and the check that each file passes."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion.build import NAME, Built, remove, write
from kdistill.conversion.float32 import Prepared, prepare
from kdistill.conversion.graph import keeps_range
from kdistill.conversion.refusals import recurrent_layers
from kdistill.conversion.tflite_converter import USUAL, Tuning
from kdistill.conversion.verify import METRICS, as_examples, compare_built, logits_of, outputs_to_compare
from kdistill.errors import CheckFailed, FileRefused, InputError
from kdistill.networks import saving
from kdistill.recipe import Profile
from kdistill.recipe.values import as_dict
from kdistill.repairs.attempts import Step, Steps, attempt, digest_of, refused_attempt, sentence, summary
from kdistill.repairs.candidates import COUNTS, Case, best_of, candidate, costly_layers, usual_or
from kdistill.repairs.unrolled import unrolled
from kdistill.tflite.activation_ranges import EXTREMES, KINDS, SQUARED_ERROR
from kdistill.tflite.interpreter import File

IMAGES = 2000  # calibration examples of other ranges
MOST_CHECKS = 3  # of files with layers in float
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Retraining:
    """Quantization-aware training: `train` returns the trained copy of a model; `settings`: what decides its outcome,
    as text."""

    train: Callable[[keras.Model], keras.Model]
    settings: str


class Ladder:
    """One repair.

    Args:
        case: the student and what its files are built of.
        path: of the file.
        examples: on which files are checked.
        max_bytes, keep, say: as for `repair`.
        retraining: gives the quantization-aware training once it is needed, or None where there is none.
    """

    def __init__(self, case: Case, path: Path, examples, max_bytes=None, retraining=None, keep=None, say=print):
        self.case, self.path, self.examples, self.max_bytes = case, path, examples, max_bytes
        self.say, self._retraining_of = say, retraining
        self._first_refusal = self._last_refusal = None
        self.rows: list[dict] = []
        self.best = Step()  # its tuning is the best one so far, with its error
        self._keep = None if keep is None else Path(keep)
        self._steps = Steps(self._keep)
        self._references: dict[str, tuple] = {}  # by hash of the weights
        self._data: str | None = None  # a hash of what files are compared on

    @cached_property
    def retraining(self) -> Retraining | None:
        return None if self._retraining_of is None else self._retraining_of()

    @property
    def profile(self) -> Profile:
        return self.case.profile

    def climb(self, refusal: Exception | None = None) -> dict:
        """The dict of the file, with `attempts`; see `repair`. `refusal`: why the usual file was refused already."""
        if refusal is None:
            refusal = self._as_it_is()
            if isinstance(refusal, dict):
                return {**refusal, "attempts": self.rows}
        else:
            self._add(refused_attempt(AS_IT_IS, refusal))
        self._first_refusal = refusal
        self._check_repairable(refusal)
        for name, step in self._ways():
            file = self._step(name, step)
            if file is not None:
                return {**file, "attempts": self.rows}
        raise self._failure()

    def _ways(self) -> Iterator[tuple[str, Callable[[], dict | None]]]:
        if recurrent_layers(self.case.student.model):
            yield "unrolled", self._unroll
        int8 = self.profile.quantization == "int8"
        if int8:
            yield "ranges", self._other_ranges
            yield "equal channels", self._equal_channels
        yield "float layers", self._float_layers
        if int8:
            yield "int16", self._int16
            yield "training", self._train

    def _check_repairable(self, refusal: Exception) -> None:
        """Raises where no way can help: said at once."""
        loops = recurrent_layers(self.case.student.model)
        if isinstance(refusal, InputError):
            if not loops:
                raise InputError(f"{refusal} Repair cannot help: it changes how numbers are stored, not operators.")
            return
        kind = self.profile.quantization
        if kind in ("none", "float16", "int4") and not loops:
            what = "nothing in such a file is calibrated" if kind != "none" else "such a file computes as the model"
            text = f"{refusal.reason} Repair cannot help: with quantization '{kind}' {what}."
            raise FileRefused(text, refusal.advice, refusal.check, refusal.size, self.rows)

    def _as_it_is(self) -> dict | Exception:
        start = time.perf_counter()
        try:
            file = self._checked(self.case, self.case.built(USUAL), AS_IT_IS, start)
        except InputError as error:
            self._add(refused_attempt(AS_IT_IS, error, seconds=time.perf_counter() - start))
            return error
        return self._last_refusal if file is None else file

    def _step(self, name: str, step: Callable[[], dict | None]) -> dict | None:
        """Runs a step of the repair, or reads it from the folder."""
        key = self._key(name)
        stored = self._steps.load(name, key, self.path)
        if stored is not None:
            self.best = dataclasses.replace(stored, attempts=[], file=None)
            for row in stored.attempts:
                self._add(row, " (finished before)")
            if name == "unrolled" and not stored.file:
                self._use_unrolled()
            return stored.file
        before = len(self.rows)
        file = step()
        record = dataclasses.replace(self.best, attempts=self.rows[before:], file=file)
        self._steps.save(name, key, record)
        return file

    # The ways, in their order.

    def _use_unrolled(self) -> bool:
        try:
            student = unrolled(self.case.student)
        except InputError as error:
            self._add(refused_attempt("recurrent layers unrolled", error))
            return False
        self.case = dataclasses.replace(self.case, student=student, _reference=[])
        return True

    def _unroll(self) -> dict | None:
        names = ", ".join(recurrent_layers(self.case.student.model))
        action, start = f"recurrent layers unrolled: {names}", time.perf_counter()
        if not self._use_unrolled():
            raise self._failure()
        try:
            return self._checked(self.case, self.case.built(USUAL), action, start)
        except InputError as error:
            self._add(refused_attempt(action, error, seconds=time.perf_counter() - start))
            raise self._failure() from error

    def _other_ranges(self) -> dict | None:
        return self._choose([Tuning(images=IMAGES, ranges=kind) for kind in KINDS], "better calibration")

    def _equal_channels(self) -> dict | None:
        ranges = (EXTREMES, SQUARED_ERROR)
        tunings = [Tuning(images=IMAGES, ranges=kind, equalized=True) for kind in ranges]
        return self._choose(tunings, "channels of equal width")

    def _choose(self, tunings: list[Tuning], action: str) -> dict | None:
        start = time.perf_counter()
        chosen = best_of(self.case, tunings)
        if chosen is None:
            self._add(attempt(action, "The converter refuses it.", seconds=time.perf_counter() - start))
            return None
        digest = hashlib.sha256(chosen.built.content).hexdigest()
        if digest in self.best.digests:
            reason = "It changes nothing in the file."
            return self._add(attempt(action, reason, skipped=True, seconds=time.perf_counter() - start))
        self.best.digests.append(digest)
        if chosen.error < self.best.error:
            self.best.tuning, self.best.error = chosen.tuning, chosen.error
        return self._checked(self.case, chosen.built, f"{action}: {_words(chosen.tuning)}", start)

    def _float_layers(self) -> dict | None:
        action, start = "layers in float", time.perf_counter()
        reason = int8_throughout(self.profile)
        if reason:
            return self._add(attempt(action, reason, skipped=True))
        layers = costly_layers(self.case, self.best.tuning)
        if not layers:
            reason = "The costs of layers cannot be measured, because the model has several inputs or its file crashes."
            return self._add(attempt(action, reason, skipped=True))
        checks = 0
        for count in (*(count for count in COUNTS if count < len(layers)), len(layers)):
            tensors = tuple(tensor for _, some in layers[:count] for tensor in some)
            names = ", ".join(name for name, _ in layers[:count])
            try:
                one = candidate(self.case, dataclasses.replace(self.best.tuning, float_tensors=tensors))
            except InputError as error:
                return self._add(refused_attempt(f"{action}: {names}", error, seconds=time.perf_counter() - start))
            last = count == len(layers)
            if one.agreement < self.profile.min_agreement and not last:
                continue
            file = self._checked(self.case, one.built, f"{action}: {names}", start)
            checks, start = checks + 1, time.perf_counter()
            if file or checks == MOST_CHECKS:
                return file
        return None

    def _int16(self) -> dict | None:
        action, start = "activations in int16", time.perf_counter()
        reason = int8_throughout(self.profile)
        if reason:
            return self._add(attempt(action, reason, skipped=True))
        try:
            one = candidate(self.case, Tuning(activations="int16"))
        except InputError as error:
            return self._add(refused_attempt(action, error, seconds=time.perf_counter() - start))
        return self._checked(self.case, one.built, action, start)

    def _train(self) -> dict | None:
        action, start = "quantization-aware training", time.perf_counter()
        if self.retraining is None:
            return self._add(attempt(action, "There is no teacher and no training data.", skipped=True))
        profile = self.profile
        if not keeps_range(profile):  # the trained model takes raw pixels
            profile = dataclasses.replace(profile, mean=(), std=())
        try:
            model = self.retraining.train(self.case.student.model)
            if self._keep is not None:
                saving.save_model(model, self._keep / "trained.keras")
            student = prepare(model, self.case.student.meanings)
            case = dataclasses.replace(self.case, student=student, profile=profile, _reference=[])
            chosen = best_of(case, usual_or(self.best.tuning))
        except (InputError, CheckFailed) as error:
            return self._add(refused_attempt(action, error, seconds=time.perf_counter() - start))
        if chosen is None:
            return self._add(attempt(action, "The converter refuses it.", seconds=time.perf_counter() - start))
        return self._checked(case, chosen.built, action, start)

    # The check, which each file passes in the same way.

    def _checked(self, case: Case, built: Built, action: str, start: float) -> dict | None:
        """Writes a file if it holds its limits, and adds a row. `case`: what it was built of."""
        measured: dict = {}

        def measure(part: Path) -> dict:
            self._compare(case, built, part, measured)
            return {name: measured["check"][name] for name in METRICS}

        try:
            _check_int8(built)
            file = {**write(built, self.path, measure), "check": measured["check"]}
            if self.max_bytes and file["bytes"] > self.max_bytes:
                remove(self.path)
                text = f"The file has {file['bytes']:,} bytes; the limit is {self.max_bytes:,}."
                raise FileRefused(text, "", measured["check"], file["bytes"])
        except FileRefused as error:
            self._last_refusal = error
            size = {"bytes": error.size or len(built.content), "microseconds": measured.get("microseconds")}
            return self._add(refused_attempt(action, error, seconds=time.perf_counter() - start, **size))
        size = {"bytes": file["bytes"], "microseconds": measured["microseconds"]}
        self._add(attempt(action, seconds=time.perf_counter() - start, **{**measured["check"], **size}))
        return file

    def _compare(self, case: Case, built: Built, path: Path, measured: dict) -> None:
        """Puts check and microseconds of a file into `measured`. Raises `FileRefused`."""
        try:
            measured["check"] = compare_built(built, path, *self._reference(case), case.profile)
        except FileRefused as error:
            if error.check is None:
                raise
            measured["check"], refusal = error.check, error
        else:
            refusal = None
        measured["microseconds"] = File(path, trusted=True).latency(warmup=5, runs=50, repeats=1)["median_us"]
        if refusal is not None:
            raise refusal
        if case is not self.case:  # a trained copy: its file must also be as accurate as the student
            compare_built(
                built, path, *self._reference(self.case), dataclasses.replace(self.profile, min_agreement=0.0)
            )

    def _reference(self, case: Case) -> tuple:
        """What the file of a student is compared with: outputs, inputs and labels."""
        student = case.student
        if student.weights_sha256 not in self._references:
            if student.classifies_images:
                images, labels = as_examples(self.examples)
                compared = logits_of(student, case.profile, images), images, labels
            else:
                compared = outputs_to_compare(student, case.profile, self.examples)
            self._references[student.weights_sha256] = compared
        return self._references[student.weights_sha256]

    def _key(self, name: str) -> str:
        """What decides the outcome of a step."""
        if self._data is None:  # the outputs stand for the examples and for the weights
            outputs, _, labels = self._reference(self.case)
            parts = [self.case.sample(), outputs, {} if labels is None else labels]
            arrays = [one for part in parts for one in (part.values() if isinstance(part, Mapping) else [part])]
            self._data = digest_of([self.case.student.weights_sha256], [np.asarray(one) for one in arrays])
        settings = [name, self._data, as_dict(self.profile), self.max_bytes]
        if name == "training":
            settings.append(self.retraining.settings if self.retraining else None)
        return digest_of(settings)

    def _add(self, row: dict, end: str = "") -> None:
        self.rows.append(row)
        self.say(f"Repair for '{self.profile.name}': {sentence(row)}{end}")

    def _failure(self) -> FileRefused:
        refusal = self._first_refusal
        reason = refusal.reason if isinstance(refusal, FileRefused) else str(refusal)
        text = f"{reason} Repair tried: {summary(self.rows)}."
        advice = getattr(refusal, "advice", "") or "Use a profile with less quantization (phone_cpu, phone_gpu)."
        return FileRefused(
            text, advice, getattr(refusal, "check", None), getattr(refusal, "size", None), attempts=self.rows
        )


def _check_int8(built: Built) -> None:
    """Raises `FileRefused` for layers in float where the profile is for hardware that has int8 only."""
    layers = [row["layer"] or row["operator"] for row in built.float_layers]
    if layers and int8_throughout(built.profile):
        raise FileRefused(
            f"The file for '{built.profile.name}' computes {', '.join(dict.fromkeys(layers))} in float.",
            size=len(built.content),
        )


def int8_throughout(profile: Profile) -> str:
    """Why a profile permits neither float nor int16, in a sentence; empty if it does."""
    if profile.quantization != "int8":
        return ""
    if profile.operators == "micro":
        return f"The profile '{profile.name}' is for microcontrollers, in int8 throughout."
    ends = [
        end for end, kind in (("inputs", profile.input_type), ("outputs", profile.output_type)) if kind != "float32"
    ]
    if ends:
        return (
            f"The profile '{profile.name}' has integer {' and '.join(ends)}: it is for hardware that computes in int8."
        )
    return ""


def _words(tuning: Tuning) -> str:
    """The ranges of a tuning in words."""
    ranges = {EXTREMES: "smallest and largest numbers", SQUARED_ERROR: "ranges of the least squared error"}
    text = ranges.get(tuning.ranges) or f"ranges without {tuning.ranges} of the numbers at each end"
    return f"{text}, on up to {tuning.images:,} examples"


def repair_profiles(
    student: Prepared,
    folder: Path,
    profiles: Sequence[Profile],
    calibration,
    examples,
    refused: dict[str, Exception],
    retraining: Callable[[Profile], Retraining | None],
    *,
    class_names=None,
    about: dict | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Repairs the files of the profiles that `conversion.export.export_profiles` has refused.

    Removes from `refused` what holds its limits now, and puts the attempts into the other errors. Finished steps are
    stored in `folder`/repair/PROFILE. `retraining`: gives the training for a profile. Returns the files by profile.
    """
    files = {}
    for profile in profiles:
        case = Case(student, profile, calibration, class_names, about)
        path, keep = folder / profile.name / NAME, folder / "repair" / profile.name
        try:
            ladder = Ladder(case, path, examples, retraining=partial(retraining, profile), keep=keep, say=say)
            files[profile.name] = ladder.climb(refused[profile.name])
            del refused[profile.name]
        except (FileRefused, InputError) as error:
            refused[profile.name] = error
            say(f"Refused: {error}")
    return files
