"""Successive halving: all students a little, the best third longer; validation picks, and the teacher runs once.

The students of a round train side by side on the teacher's stored outputs. Every round starts anew, with the schedule
of its own length: a student whose learning rate is still high says little.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from collections.abc import Mapping as AnyMapping

import numpy as np

from kdistill.data import few_labels
from kdistill.data.batches import evaluation_batches, steps_per_epoch
from kdistill.distillation.distiller import Distiller, from_recipe
from kdistill.evaluation import diagnostics
from kdistill.networks import saving
from kdistill.recipe import Distill, Network, Recipe, Term
from kdistill.runs.arms import Arms
from kdistill.runs.teaching import Teaching
from kdistill.schema import Mapping
from kdistill.shrinking.space import Candidate
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.frozen import frozen
from kdistill.training import side_by_side
from kdistill.training.side_by_side import OncePerBatch, SideBySide
from kdistill.training.strategy import SINGLE_DEVICE

KEPT = 3  # of so many students one goes on to the next round, with so many times the epochs
FIRST_EPOCHS = 1
PROBE_STEPS = 10
TRACING_SECONDS = 4.0  # of a student's first step, roughly
SCORES = {"accuracy": (float, None), "nll": (float, None), "seconds": float, "epochs": int}
RECORD = {"epochs": int, "seconds": float, "students": Mapping(SCORES)}  # of a stage
Member = tuple[Network, Distill]  # a student and how it is taught


class Search:
    """Trains the students of a search, stage by stage. A stage that an earlier session has finished is read.

    Args:
        arms: with the teacher; its recipe is the template.
        cache: the folder of the teacher's stored outputs, or `off`.
        together: the most students at a time. None: as many as the memory takes.
    """

    def __init__(self, arms: Arms, cache: str, together: int | None = None):
        self.arms, self.cache, self.together = arms, cache, together
        self.splits = few_labels.for_student(arms.splits)
        self.steps = steps_per_epoch(self.splits.train, arms.recipe.training.batch_size)

    def train(self, stage: str, members: AnyMapping[str, Member], epochs: int) -> dict[str, dict]:
        """Trains students for so many epochs, side by side as far as the memory allows.

        Each is saved as `students/NAME.keras`. Returns by name accuracy and nll on the validation examples (None where
        the loss was not finite), the epochs, and the seconds of a student.
        """
        names, students = list(members), {}
        size = self.together or self._models_that_fit(members, epochs)
        for place, start in enumerate(range(0, len(names), size)):
            part = {name: members[name] for name in names[start : start + size]}
            students |= self._train_part(f"{stage}-{place}" if len(names) > size else stage, part, epochs)
        return students

    def _train_part(self, stage: str, members: AnyMapping[str, Member], epochs: int) -> dict[str, dict]:
        folder, say = self.arms.folder, self.arms.say
        if folder.is_finished(stage):
            say(f"{stage}: already finished")
            record = folder.record(stage, RECORD)
            if set(record["students"]) == set(members) and record["epochs"] == epochs:
                return record["students"]
        recipe = _with_epochs(self.arms.recipe, epochs)
        teaching = self.teaching(recipe)
        group = self._group(members, teaching, epochs)
        say(f"{stage}: {len(members)} students side by side, {epochs} epoch{'s' * (epochs > 1)}")
        options = {**teaching.views(recipe.seed), "stored": teaching.replay(stage, recipe.seed, self.cache)}
        started = time.perf_counter()
        checkpoints = folder.checkpoints(stage)
        fit = side_by_side.fit(
            group, self.splits, recipe.data, recipe.training, checkpoints=checkpoints, say=say, **options
        )
        outputs, broken = group.predict(self.splits.validation.images), group.broken()
        seconds = max(fit["seconds"], time.perf_counter() - started) / len(members)
        students = {}
        for name, member in group.members.items():
            students[name] = self._scores(outputs[name], name in broken) | {"seconds": seconds, "epochs": epochs}
            path = folder.path / "students" / f"{name}.keras"
            path.parent.mkdir(exist_ok=True)
            saving.save_model(member.student, path)
        folder.finish_record(stage, {"epochs": epochs, "seconds": seconds * len(members), "students": students})
        return students

    def teaching(self, recipe: Recipe) -> Teaching:
        """The teacher for a stage of this recipe, whose epochs differ from stage to stage."""
        arms = self.arms
        place = recipe, arms.splits, arms.folder, SINGLE_DEVICE, arms.say
        return Teaching(arms.models["teacher"], *place, foreign=arms.teaching.foreign)

    def _group(self, members: AnyMapping[str, Member], teaching: Teaching, epochs: int) -> SideBySide:
        teacher = OncePerBatch(frozen(teaching.model))
        shown = Adapted(teacher, outputs="logits")  # whatever those of the teacher are, so that no student has to look
        training = _with_epochs(self.arms.recipe, epochs).training
        compiled = {
            name: side_by_side.compiled(self._distiller(member, shown, epochs), training, self.steps * epochs)
            for name, member in members.items()
        }
        return SideBySide(compiled, teacher)

    def _distiller(self, member: Member, teacher, epochs: int) -> Distiller:
        network, distill = member
        student = self.arms.network(network, self.arms.recipe.seed)
        return from_recipe(distill, student, teacher, self.steps * epochs, self.splits.head)

    def _models_that_fit(self, members: AnyMapping[str, Member], epochs: int) -> int:
        training = self.arms.recipe.training
        largest = max(members.values(), key=lambda member: self.arms.network(member[0], 0).count_params())
        model = side_by_side.compiled(self._distiller(largest, self.arms.teaching.model, epochs), training, self.steps)
        return side_by_side.models_that_fit({"largest": model}, training.batch_size)

    def _scores(self, outputs: np.ndarray, broken: bool) -> dict:
        """Accuracy and NLL of the logits `[n, classes]` of the validation examples."""
        labels = self.splits.validation.labels
        if broken or not np.isfinite(outputs).all():
            return {"accuracy": None, "nll": None}
        accuracy = float(np.mean(outputs.argmax(axis=1) == labels))
        return {"accuracy": accuracy, "nll": float(diagnostics.negative_log_likelihood(outputs, labels))}

    def seconds_per_step(self, member: Member) -> float:
        """How long a step of this student takes, with the teacher running: tried on a few batches."""
        group = self._group({"probe": member}, self.teaching(self.arms.recipe), 1)
        batch = min(self.arms.recipe.training.batch_size, len(self.splits.train))
        examples = self.splits.train.select(slice(batch))
        dataset = evaluation_batches(examples, batch).repeat()
        group.train(iter(dataset), 1)  # traces
        started = time.perf_counter()
        group.train(iter(dataset), PROBE_STEPS)
        return (time.perf_counter() - started) / PROBE_STEPS


def halve(
    search: Search, candidates: AnyMapping[str, Candidate], epochs: Callable[[int], int], distill: Distill
) -> list[dict]:
    """The rounds, each a dict of `epochs` and `students` (scores by name, the best first).

    `epochs`: the number of the round, from 0 on -> its epochs; it is asked after the round before. The last round has
    `KEPT` students or fewer.
    """
    rounds, names = [], list(candidates)
    while True:
        count = epochs(len(rounds))
        members = {name: (candidates[name].network, distill) for name in names}
        last = len(names) <= KEPT
        if rounds and count == rounds[-1]["epochs"]:  # the same training again would have the same end
            students = {name: rounds[-1]["students"][name] for name in names}
        else:
            students = search.train(f"round-{len(rounds) + 1}", members, count)
        order = ranked(students)
        rounds.append({"epochs": count, "students": {name: students[name] for name in order}})
        best = students[order[0]]
        search.arms.say(f"Round {len(rounds)}: {order[0]} is ahead, {_percent(best['accuracy'])} on validation")
        if last:
            return rounds
        names = order[: max(2, math.ceil(len(names) / KEPT))]


def number_of_rounds(candidates: int) -> list[int]:
    """How many students each round of `halve` has."""
    counts = [candidates]
    while counts[-1] > KEPT:
        counts.append(max(2, math.ceil(counts[-1] / KEPT)))
    return counts


def ranked(students: AnyMapping[str, dict]) -> list[str]:
    """The names, the best first: by accuracy, of equal ones by NLL; students whose loss was not finite are last."""
    return sorted(
        students,
        key=lambda name: (-(students[name]["accuracy"] or 0), students[name]["nll"] or math.inf),
    )


def methods(distill: Distill, classes: int) -> dict[str, Distill]:
    """How the winner may be taught: the template's way, other weights and temperatures, and another loss."""
    weight = 1.0 if distill.distillation_weight == 1 else 0.9  # 1: there may be no labels
    plain = {
        f"weight {weight:g}, T 2": Distill(weight, 2.0),
        "weight 1, T 4": Distill(1.0, 4.0),
        "DIST": Distill(weight, None, {"kd": Term("dist")}),  # Huang et al. 2022, arXiv 2205.10536
    }
    if classes == 2:  # whose correlation over classes has no gradient
        plain.pop("DIST")
    return {"as given": distill} | {name: way for name, way in plain.items() if way != distill}


def _with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, epochs=epochs))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"
