"""Checks the page of evidence: every claim has what it needs, and README states no other figures.

    python benchmarks/claims.py [README.md [docs/experiments.md]]
    python benchmarks/claims.py --row RUN_FOLDER MACHINE      the row of a finished run, for the table

A claim is a row of the tables in `docs/experiments.md`. Differences, intervals and verdicts have to fit together; every
figure of README outside of its code (a number with decimals, or of 1,000 and more) has to stand in one of the rows.
Standard library only. The exit status is 1 if something does not agree.
"""

import datetime
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLAIMS, OTHERS = "## Claims", "## Other figures"
DIFFERENCE = re.compile(r"([+-][\d.]+), ([+-][\d.]+) to ([+-][\d.]+)(?: \(90 %\))?(?:, p = [\d.e-]+)?")
MACHINE = re.compile(r"[A-Z], 20\d\d-[01]\d-[0-3]\d")
ROUNDING = 0.011  # points: of three numbers with two decimals
MARGIN = 0.2  # points, as in the recipes
FIGURE = re.compile(r"(?<![\w.,/])\d[\d,]*\.\d+(?:e-\d+)?(?![\w.]*\w)|(?<![\w.,/])\d{1,3}(?:,\d{3})+(?!\d)")
VERSION = r"(?:Python|Keras|TensorFlow|Apache|BY-SA) [\d.]*\d(?: to [\d.]*\d)?"
NO_CLAIM = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|" + VERSION, re.DOTALL)


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, row by row, without the head of the table."""
    section = page.partition(heading + "\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def wrong_in(row: list[str]) -> str | None:
    """What is wrong with a claim, in words, or None."""
    if len(row) != 8:
        return f"expected 8 cells, received {len(row)}"
    _, command, seeds, control, student, difference, verdict, machine = row
    numbers = DIFFERENCE.fullmatch(difference)
    if not all(row) or "`" not in command or not seeds.isdigit() or not numbers:
        return "expected a command, a number of seeds, and a difference such as '+0.45, +0.33 to +0.57'"
    value, low, high = map(float, numbers.groups())
    if abs(float(student) - float(control) - value) > ROUNDING:
        return f"{student} less {control} is not {value:+.2f}"
    if not low <= value <= high:
        return f"the difference is outside of its interval, {difference}"
    fits = {
        "BETTER": low > 0,
        "WORSE": high < 0,
        "EQUIVALENT": low > -MARGIN and high < MARGIN,
        "UNDECIDED": low <= 0 <= high,
    }
    if not fits.get(verdict):
        return f"the interval does not give {verdict}"
    if ("(90 %)" in difference) != (verdict == "EQUIVALENT"):
        return "EQUIVALENT rests on the 90 % interval, and it alone"
    return None if MACHINE.fullmatch(machine) else f"expected machine and date, received '{machine}'"


def figures(text: str) -> list[str]:
    """The figures of a text outside of its code and links, in their order."""
    return FIGURE.findall(NO_CLAIM.sub(" ", text))


def check(readme: str, page: str) -> list[str]:
    """What does not agree, one sentence each."""
    claims, others = table(page, CLAIMS), table(page, OTHERS)
    if not claims or not others:
        return [f"expected tables under '{CLAIMS}' and '{OTHERS}'"]
    findings = [f"{row[0]}: {wrong}" for row in claims if (wrong := wrong_in(row))]
    for row in others:
        if len(row) != 4 or "`" not in row[2] or not MACHINE.fullmatch(row[3]):
            findings.append(f"{row[0]}: expected figures, a command, and machine and date")
    stated = {figure for row in (*claims, *others) for cell in row for figure in figures(cell)}
    return findings + [
        f"README states {figure}, which is in no row" for figure in figures(readme) if figure not in stated
    ]


def row_of(report: dict, machine: str, day: str) -> str:
    """The row of a run's report for the table of claims; paths are left out of its command."""
    verdict = report["verdict"]
    control, student = (100 * sum(verdict[arm]) / len(verdict[arm]) for arm in ("control", "student"))
    value, low, high = (100 * verdict[key] for key in ("difference", "low", "high"))
    command = re.sub(r" --(?:out|cache) \S+| --resume| --force", "", report["command"])
    command = re.sub(r"--data-dir \S+", "--data-dir FOLDER", re.sub(r"--teacher \S+", "--teacher FILE", command))
    command = re.sub(r"(run|sweep) \S*?(\w+)\.py", r"\1 \2", command)
    difference = f"{value:+.2f}, {low:+.2f} to {high:+.2f}"
    if verdict["level"] != 0.95:  # two one-sided tests
        difference += f" ({100 * verdict['level']:g} %)"
    cells = ("...", f"`{command}`", verdict["seeds"], f"{control:.2f}", f"{student:.2f}", difference, verdict["word"])
    return "| " + " | ".join(map(str, (*cells, f"{machine}, {day}"))) + " |"


def main(arguments: list[str]) -> int:
    """Prints what does not agree, or a row. Returns the exit status."""
    if arguments[:1] == ["--row"]:
        path = Path(arguments[1]) / "report.json"
        day = datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
        print(row_of(json.loads(path.read_text()), arguments[2], day))
        return 0
    paths = [ROOT / "README.md", ROOT / "docs" / "experiments.md"]
    readme, page = (Path(path).read_text() for path in (*arguments, *paths[len(arguments) :]))
    findings = check(readme, page)
    print("\n".join(findings) or f"{len(table(page, CLAIMS))} claims; README agrees.")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
