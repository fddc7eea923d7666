"""k students side by side, against k runs of their own, and against one teacher pass and k student trainings.

    python benchmarks/side_by_side.py [--students 1 2 4 8 16] [--repeats 5] [--steps 40] [--grid]

The pair of `recipes/mnist.py` (LeNet teacher, student of 7,170 parameters, batch 128, Adam) on the sample that ships
with kdistill. All sides are measured in one process, in turn, the same steps of the same input pipeline:

    teacher    forward of one batch alone               student    one student trained on labels alone
    single     one Distiller: a run of its own          together   k Distillers side by side, one teacher forward

Each in wall seconds and in CPU seconds of this process per step, medians over the repeats; ratios are medians of the
ratios within a repeat. `--grid`: also the 51 students of 11 weights by 5 temperatures. Writes json and a picture.
"""

import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf
from common import arguments

from kdistill import provenance
from kdistill.data import load
from kdistill.data.batches import training_batches
from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.networks import architectures
from kdistill.recipe.loading import load_recipe
from kdistill.teachers.frozen import frozen
from kdistill.training import side_by_side
from kdistill.training.side_by_side import OncePerBatch, SideBySide

RECIPE = load_recipe("mnist", "lenet")
WEIGHTS, TEMPERATURES = [i / 10 for i in range(11)], [1.0, 2.0, 4.0, 8.0, 20.0]
SETTINGS = [(w, t) for w in WEIGHTS for t in TEMPERATURES if w or t == 1]  # 51: weight 0 knows no temperature


def network() -> keras.Model:
    """The student, as every setting starts it."""
    keras.utils.set_random_seed(0)
    return architectures.build(RECIPE.student, (28, 28, 1), 10)


def group(students: list[Supervised], teacher: OncePerBatch | None = None) -> SideBySide:
    """The students, compiled as the recipe says."""
    members = {str(i): side_by_side.compiled(s, RECIPE.training, 1000) for i, s in enumerate(students)}
    return SideBySide(members, teacher)


def distillers(count: int, teacher) -> SideBySide:
    """So many students of the grid, all shown one forward of the teacher."""
    shown = OncePerBatch(frozen(teacher))
    # Spread over the grid, so that weights and temperatures differ.
    chosen = [SETTINGS[(place * len(SETTINGS)) // count] for place in range(count)]
    return group([Distiller(network(), shown, distillation_weight=w, temperature=t) for w, t in chosen], shown)


def timed(call: Callable[[], None], steps: int) -> tuple[float, float]:
    """Wall and CPU seconds per step."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def main() -> None:
    """Measures, prints the table, writes json and a picture."""
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--students", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--grid", action="store_true", help="measure the 51 students of the 11 by 5 grid too")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    splits = load(RECIPE.data)
    keras.utils.set_random_seed(1)
    teacher = architectures.build(RECIPE.teacher, (28, 28, 1), 10)
    steps, batch = options.steps, RECIPE.training.batch_size

    def batches():
        return iter(training_batches(splits.train, RECIPE.data, batch, 0, 0).take(steps))

    @tf.function
    def teach(iterator):
        total = 0.0
        for _ in tf.range(steps):
            total += tf.reduce_sum(teacher(next(iterator)[0], training=False))
        return total

    counts = sorted({*options.students, *([len(SETTINGS)] if options.grid else [])})
    alone, single = group([Supervised(network())]), distillers(1, teacher)
    sides: dict[str, Callable[[], None]] = {
        "teacher": lambda: teach(batches()).numpy(),
        "student": lambda: alone.advance(batches(), steps),
        "single": lambda: single.advance(batches(), steps),
    }
    first, bytes_before = {}, {}
    for count in counts:
        members = distillers(count, teacher)
        sides[f"together {count}"] = lambda members=members: members.advance(batches(), steps)
    for name, call in sides.items():  # traces; not measured with the others
        bytes_before[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - bytes_before[name]) * 1024
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, call in sides.items():
            measured[name].append(timed(call, steps))
    rows = []
    for count in counts:
        row = {"students": count, "first_call_seconds": first[f"together {count}"]}
        for place, clock in enumerate(("wall", "cpu")):
            each = {name: [pair[place] for pair in pairs] for name, pairs in measured.items()}
            mine = each[f"together {count}"]
            row[f"{clock}_ms_per_step"] = 1000 * statistics.median(mine)
            runs = [count * s / m for s, m in zip(each["single"], mine, strict=True)]
            limit = [m / (t + count * s) for m, t, s in zip(mine, each["teacher"], each["student"], strict=True)]
            row[f"{clock}_runs_over_together"] = statistics.median(runs)
            row[f"{clock}_together_over_limit"] = statistics.median(limit)
            row[f"{clock}_together_over_limit_range"] = [min(limit), max(limit)]
        rows.append(row)
    base = {
        f"{name}_{clock}_ms": 1000 * statistics.median(pair[place] for pair in measured[name])
        for name in ("teacher", "student", "single")
        for place, clock in enumerate(("wall", "cpu"))
    }
    about = {"machine": provenance.machine(), "versions": provenance.versions(), "steps": steps, "batch": batch}
    result = {**about, "repeats": options.repeats, **base, "peak_growth_of_the_last": grown, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "side_by_side.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, options.out / "side_by_side.png")
    print(", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in base.items()))
    titles = ("wall ms", 10), ("k runs / k together", 22), ("together / limit", 18), ("cpu: runs", 11), ("limit", 8)
    print(f"{'k':>4}" + "".join(f"{title:>{width}}" for title, width in (*titles, ("first s", 9))))
    for row in rows:
        print(
            f"{row['students']:>4}{row['wall_ms_per_step']:>10.1f}{row['wall_runs_over_together']:>22.2f}"
            f"{row['wall_together_over_limit']:>18.2f}{row['cpu_runs_over_together']:>11.2f}"
            f"{row['cpu_together_over_limit']:>8.2f}{row['first_call_seconds']:>9.1f}"
        )


def draw(rows: list[dict], path: Path) -> None:
    """Cost of k students side by side, relative to k runs and to the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    counts = [row["students"] for row in rows]
    for clock, style in (("wall", "-"), ("cpu", "--")):
        runs = [1 / row[f"{clock}_runs_over_together"] for row in rows]
        limit = [row[f"{clock}_together_over_limit"] for row in rows]
        axis.plot(counts, runs, style, marker="o", color="C0", label=f"together / k single runs ({clock})")
        axis.plot(counts, limit, style, marker="o", color="C1", label=f"together / (teacher + k students) ({clock})")
    axis.axhline(1, color="0.5", linewidth=0.8)
    axis.set(xlabel="students side by side", ylabel="time per step, ratio", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, counts)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
