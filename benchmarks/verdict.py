"""How often the verdict is right: simulated experiments with and without an effect, over 5 seeds and over 3..10.

    python benchmarks/verdict.py [--experiments 4000]

Differences of student and control are drawn from a normal distribution, in units of their standard deviation over
seeds (the scatter). A row is one true difference; smaller differences than `margin` count as equal. Columns: the shares
of experiments that end with each word, and the mean number of seeds that were trained.
"""

import argparse
import json

import numpy as np

from kdistill.evaluation.verdict import judge

SCATTER = 0.003  # of the differences, a share of 1; only ratios to it matter
IMAGES = 10**7  # so many that one image is no limit
LOOKS = range(3, 11)
WORDS = ("BETTER", "WORSE", "EQUIVALENT", "UNDECIDED")


def experiment(random: np.random.Generator, effect: float, margin: float, sequential: bool) -> tuple[str, int]:
    """The last word of one experiment, and its number of seeds."""
    differences, control = random.normal(effect, SCATTER, LOOKS[-1]).tolist(), [0.0] * LOOKS[-1]
    if not sequential:
        return judge(differences[:5], control[:5], IMAGES, margin=margin)["word"], 5
    for seeds in LOOKS:
        word = judge(differences[:seeds], control[:seeds], IMAGES, margin=margin, looks=LOOKS)["word"]
        if word != "UNDECIDED":
            break
    return word, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=4000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for sequential in (False, True):
        for effect, margin in ((0, 1e-9), (0, 0.7), (0, 1.5), (0.7, 0.7), (1.5, 1.5), (1, 1e-9), (2, 1e-9)):
            random = np.random.default_rng(0)
            ends = [
                experiment(random, effect * SCATTER, margin * SCATTER, sequential) for _ in range(options.experiments)
            ]
            words = [word for word, _ in ends]
            row = {"seeds": "3..10" if sequential else "5", "effect": effect, "margin": round(margin, 3)}
            row |= {word: words.count(word) / len(words) for word in WORDS}
            rows.append(row | {"trained": float(np.mean([seeds for _, seeds in ends]))})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{options.experiments:,} experiments per row; effect and margin in units of the scatter over seeds")
    print("| seeds | effect | margin | BETTER % | WORSE % | EQUIVALENT % | UNDECIDED % | seeds trained |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        shares = " | ".join(f"{100 * row[word]:.1f}" for word in WORDS)
        print(f"| {row['seeds']} | {row['effect']} | {row['margin']} | {shares} | {row['trained']:.1f} |")


if __name__ == "__main__":
    main()
