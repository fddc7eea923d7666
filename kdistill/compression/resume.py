"""The finished steps of a compression in a folder, from which the same compression resumes after an interruption."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import keras

from kdistill import files
from kdistill.compression.tfmot import Goals
from kdistill.errors import InputError
from kdistill.networks import saving
from kdistill.recipe import Stage, Term
from kdistill.schema import Mapping

KerasSchedule = keras.optimizers.schedules.LearningRateSchedule


# A decision is what a step does to a layer, in words.
RECORD = {"settings": list, "sha256?": str, "history": Mapping([(float, None)]), "decisions": Mapping(str)}


class FinishedSteps:
    """`1-prune.keras` and `1-prune.json`, `2-cluster.keras` and so on; without a folder it stores nothing.

    Schemes that begin with the same steps and settings share them.
    """

    def __init__(self, folder: str | Path | None, settings: list, goals: Goals, say):
        self._folder = None if folder is None else Path(folder)
        self._settings, self._goals, self._say = settings, goals, say
        if self._folder is not None:
            if self._folder.is_symlink():
                raise InputError(f"'{self._folder}' is a link, which is not followed. Use another folder.")
            files.check_no_links(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)

    def load(self, steps: Sequence[str], model: keras.Model) -> dict | None:
        """The record of the last of these steps, if an earlier session finished it, its weights put into `model`."""
        if self._folder is None or not self._path(steps).exists():
            return None
        path = self._path(steps)
        advice = f"Delete '{path}' to train the step again."
        record = files.read_json(path, RECORD, advice)
        if record["settings"] != self._settings_of(steps):
            self._say(f"'{path}' belongs to another student or to other settings: the step is trained again.")
            return None
        if record.get("sha256") not in (None, files.sha256(path.with_suffix(".keras"))):
            self._say(f"'{path.with_suffix('.keras')}' is damaged (another SHA-256): the step is trained again.")
            return None
        saving.load_weights(model, path.with_suffix(".keras"))
        return record

    def save(self, steps: Sequence[str], model: keras.Model, record: dict) -> None:
        """Writes model and record of the last of these steps, whole or not at all. The record comes last, as proof."""
        if self._folder is not None:
            path = self._path(steps)
            path.unlink(missing_ok=True)
            saving.save_model(model, path.with_suffix(".keras"))
            about = {"settings": self._settings_of(steps), "sha256": files.sha256(path.with_suffix(".keras"))}
            files.write_text(path, json.dumps({**record, **about}) + "\n")

    def _path(self, steps: Sequence[str]) -> Path:
        return self._folder / f"{len(steps)}-{steps[-1]}.json"

    def _settings_of(self, steps: Sequence[str]) -> list:
        """Everything that decides the outcome of the last of these steps, as JSON returns it."""
        goals = {"prune": self._goals.of_pruning(), "cluster": self._goals.of_clustering()}
        return json.loads(json.dumps([*steps, *(goals[step] for step in steps if step in goals), *self._settings]))


def settings_of(
    student: keras.Model, stage: Stage, distillation_weight, temperature, terms: dict[str, Term], *more
) -> list:
    """What decides the outcome of every step, except for the goals: numbers, terms, names and the student's weights."""
    numbers = [_plain(number) for number in (stage.learning_rate, distillation_weight, temperature)]
    terms = [
        [name, str(term.loss), _plain(term.weight), {key: _plain(value) for key, value in term.options.items()}]
        for name, term in terms.items()
    ]
    digest = hashlib.sha256(b"".join(weight.tobytes() for weight in student.get_weights())).hexdigest()
    return [stage.epochs, stage.batch_size, *numbers, terms, list(stage.skip), *more, digest]


def _plain(number):
    return [type(number).__name__, number.get_config()] if isinstance(number, KerasSchedule) else number
