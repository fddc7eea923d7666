"""The models of a run, each fitted once: what an earlier session finished is loaded, what it began is gone on with."""

from collections.abc import Callable

import keras

from kdistill import labelled, models, train, verdict
from kdistill.data import Splits
from kdistill.evaluate import predict
from kdistill.folder import RunFolder
from kdistill.recipe import Network, Recipe, Training
from kdistill.supervised import Supervised


class Arms:
    """Teacher, control, student and what else a run trains, by name: `models[name]`, and the record of each fit in
    `fits[name]`. All see the same data in the same order; networks of one seed start from the same weights."""

    def __init__(self, recipe: Recipe, splits: Splits, folder: RunFolder, say: Callable[[str], None]):
        self.recipe, self.splits, self.folder, self.say = recipe, splits, folder, say
        self.models: dict[str, keras.Model] = {}
        self.fits: dict[str, dict] = {}

    def network(self, spec: Network, seed: int) -> keras.Model:
        """The network with the start that belongs to this seed."""
        keras.utils.set_random_seed(seed)
        return models.build(spec, self.splits.train.images.shape[1:], len(self.splits.class_names))

    def teacher(self) -> keras.Model:
        """The recipe's teacher, loaded from its file or trained."""
        spec, seed = self.recipe.teacher, self.recipe.seed
        if not spec.file:
            training, splits = self.recipe.teacher_training, labelled.for_teacher(self.splits, self.recipe.data)
            return self.fit("teacher", lambda: Supervised(self.network(spec, seed)), training, seed, splits)
        shape, classes = self.splits.train.images.shape[1:], len(self.splits.class_names)
        self.models["teacher"] = models.load(spec.file, shape, classes)
        return self.models["teacher"]

    def control(self, name: str, seed: int) -> keras.Model:
        """The student trained on labels alone: the same budget, start and order as the student of this seed."""
        splits = labelled.for_control(self.splits)
        student = self.recipe.student
        return self.fit(name, lambda: Supervised(self.network(student, seed)), self.recipe.training, seed, splits)

    def student(self, name: str, seed: int, make: Callable[[keras.Model], Supervised]) -> keras.Model:
        """The student of `make(network)`, which learns from labels, where there are any, and from the teacher."""
        splits, student = labelled.for_student(self.splits), self.recipe.student
        return self.fit(name, lambda: make(self.network(student, seed)), self.recipe.training, seed, splits)

    def verdict(self, rows: list[dict]) -> dict:
        """Student against control on the test images, over the seeds that were trained."""
        accuracy = {row["name"]: row["accuracy"] for row in rows}
        ends = [f"-{place}" if place else "" for place in range(self.recipe.seeds)]
        pairs = [("student" + end, "control" + end) for end in ends]
        student, control = ([accuracy[pair[i]] for pair in pairs] for i in (0, 1))
        test = self.splits.test
        if len(pairs) > 1:
            return verdict.judge(student, control, len(test))
        right = [predict(self.models[name], test.images).argmax(axis=1) == test.labels for name in pairs[0]]
        only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        return verdict.judge(student, control, len(test), only)

    def fit(
        self, name: str, make: Callable[[], Supervised], training: Training, seed: int, splits: Splits
    ) -> keras.Model:
        """The student of what `make` gives, fitted; kept in the run folder as `<name>.keras`."""
        done = self.folder.finished(name)
        if done:
            self.say(f"{name}: finished before")
            self.models[name], self.fits[name] = done
            return self.models[name]
        model = make()
        self.say(f"Training {name}: {model.student.count_params():,} parameters, {training.epochs} epochs")
        logs, checkpoints = self.folder.path / "logs" / name, self.folder.checkpoints(name)
        data = self.recipe.data
        self.fits[name] = train.fit(model, splits, data, training, seed, logs, checkpoints, self.say)
        self.models[name] = model.student
        self.folder.finish(name, model.student, self.fits[name])
        return model.student
