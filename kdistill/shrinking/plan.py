"""How long the rounds of a search train: what is stated before, and what keeps it within its hours."""

import math
import time
from collections.abc import Mapping, Sequence

from kdistill.errors import InputError
from kdistill.shrinking.budget import Budget
from kdistill.shrinking.search import FIRST_EPOCHS, KEPT, TRACING_SECONDS, Search, methods, number_of_rounds
from kdistill.shrinking.space import Candidate

NARROWER = (0.75, 0.5)  # of the winner's width: the files that show what fewer bytes cost
FINISHING_SECONDS = 90.0  # exports, measurements and pages at the end, roughly
SAFETY = 0.85  # the share of the hours that is planned


class Plan:
    """How long each round trains: from the hours, if there are any, and the time that the first round took.

    What was planned is kept in the folder, so that a resumed search has the same rounds.
    """

    def __init__(self, search: Search, candidates: Mapping[str, Candidate], budget: Budget, started: float):
        self.search, self.candidates, self.budget, self.started = search, candidates, budget, started
        self.recipe, self.folder, self.say = search.arms.recipe, search.arms.folder, search.arms.say
        self.counts = number_of_rounds(len(candidates))
        self.most = self.recipe.training.epochs
        self.seconds_per_epoch = 0.0  # of one student

    def announce(self) -> None:
        """States the number of candidates and the time. Raises `InputError` if the hours are too few for one round."""
        if any(self.folder.path.glob("checkpoints/round-1*/finished.json")):
            return
        self._probe()
        least, likely = self.seconds(1), self.seconds(self.most)
        text = f"{len(self.candidates)} students fit and will be trained, in rounds of {_listed(self.counts)}"
        if not self.budget.hours:
            self.say(f"{text}. This takes about {_duration(likely)}; --hours limits it.")
            return
        left = self.left()
        if least > left:
            needed = math.ceil((least + time.monotonic() - self.started) / SAFETY / 36) / 100
            raise InputError(
                f"--hours {self.budget.hours:g} is too little for one round: {len(self.candidates)} students, and the "
                f"winner with {self.recipe.seeds} seeds and controls for one epoch, take about {needed:g} hours here. "
                "Give that, fewer --seeds, or fewer families (--family)."
            )
        self.say(f"{text}, within {self.budget.hours:g} hours.")

    def _probe(self) -> None:
        """Measures how long the largest student takes for an epoch, once."""
        if not self.seconds_per_epoch:
            largest = next(iter(self.candidates.values()))
            step = self.search.seconds_per_step((largest.network, self.recipe.distill))
            self.seconds_per_epoch = step * self.search.steps

    def left(self) -> float:
        """Seconds that may be planned from now on."""
        return SAFETY * 3600 * self.budget.hours - (time.monotonic() - self.started)

    def seconds(self, epochs: int, begin: int = 0) -> float:
        """The time from this round on, where the winner trains for so many epochs."""
        students, passes = 0, 0.0
        for place in range(begin, len(self.counts)):
            students += self.counts[place]
            passes += self.counts[place] * self._epochs_of(place, epochs)
        others = len(methods(self.recipe.distill, len(self.search.splits.class_names))) - 1 + len(NARROWER)
        students += others + 2
        passes += others * self._epochs_of(len(self.counts) - 1, epochs) + 2 * self.recipe.seeds * epochs
        return passes * self.seconds_per_epoch + students * TRACING_SECONDS + FINISHING_SECONDS

    def epochs(self, place: int) -> int:
        """The epochs of a round, from 0 on."""
        if place == 0 and len(self.counts) > 1:
            return FIRST_EPOCHS
        return self._epochs_of(place, self.final())

    def final(self) -> int:
        """The epochs of the winner; decided once, before the second round."""
        text = self.folder.choice("plan", "epochs", lambda: str(self._final()))
        if text is None or not text.isdecimal() or not 1 <= int(text) <= self.most:
            raise InputError(f"'{self.folder.path}' is damaged (checkpoints/plan). Start a new search.")
        return int(text)

    def _final(self) -> int:
        if not self.budget.hours:
            return self.most
        self._probe()
        if self.folder.is_finished("round-1"):
            seconds = self.folder.record("round-1", {"seconds": float})["seconds"] / len(self.candidates)
            self.seconds_per_epoch = max(seconds - TRACING_SECONDS, self.seconds_per_epoch / 2, seconds / 10)
        left, begin = self.left(), 1 if len(self.counts) > 1 else 0
        epochs = max([count for count in range(1, self.most + 1) if self.seconds(count, begin) <= left], default=1)
        self.say(f"The winner will be trained for {epochs} of {self.most} epochs, to end within the hours.")
        return epochs

    def _epochs_of(self, place: int, final: int) -> int:
        if place == 0 and len(self.counts) > 1:
            return FIRST_EPOCHS
        return max(1, final // KEPT ** (len(self.counts) - place))


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"
