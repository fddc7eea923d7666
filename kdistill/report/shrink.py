"""The report of a search for the best file within a budget: what was tried, what picked, and what it is worth."""

import json
from pathlib import Path

from kdistill.files import write_text
from kdistill.report import page
from kdistill.report.html import document, note, part, table
from kdistill.report.markdown import Table, markdown_table, provenance_lines

AGAINST = "Against its control:"


def pareto_table(result: dict) -> Table:
    """The checked files, the smallest first: accuracy on validation images against bytes, arena and time."""
    titles = ["file", "validation %", "bytes", "arena", "µs", "parameters", "epochs", ""]
    rows = []
    for row in result["pareto"]:
        state = "refused" if row["accuracy"] is None else "Pareto" if row["pareto"] else ""
        state = "winner, Pareto" if row["winner"] and row["pareto"] else "winner" if row["winner"] else state
        numbers = [_percent(row["accuracy"]), *(_number(row[key]) for key in ("bytes", "arena", "microseconds"))]
        rows.append([row["name"], *numbers, _number(row["parameters"]), str(row["epochs"]), state])
    return titles, rows


def candidate_table(result: dict) -> Table:
    """All students that were trained: costs, and the validation accuracy of each round."""
    rounds = result["rounds"]
    titles = ["student", "parameters", "bytes", "arena", "µs"]
    titles += [f"round {place}, {one['epochs']} ep. %" for place, one in enumerate(rounds, 1)]
    rows = []
    for name, costs in result["candidates"].items():
        scores = [_percent(one["students"][name]["accuracy"]) if name in one["students"] else "" for one in rounds]
        cells = [_number(costs[key]) for key in ("parameters", "bytes", "arena", "microseconds")]
        rows.append([name, *cells, *scores])
    return titles, rows


def method_table(result: dict) -> Table:
    """How the winner was taught in the small sweep, and what that gave on validation."""
    return ["taught with", "validation %"], [
        [name, _percent(one["accuracy"])] for name, one in result["methods"]["students"].items()
    ]


def seed_table(result: dict) -> Table:
    """The winner and its control, seed by seed, on the test examples."""
    rows = zip(result["seeds"], result["files"], result["controls"], strict=True)
    return ["seed", "file, test %", "control, test %"], [
        [str(seed), _percent(file["accuracy"]), _percent(control)] for seed, file, control in rows
    ]


def summary(result: dict) -> list[str]:
    """The result in sentences: the file, what chose it, and what it costs."""
    file, budget = result["file"], result["budget"]
    accuracies = [one["accuracy"] for one in result["files"] if one["accuracy"] is not None]
    mean = f"{sum(accuracies) / len(accuracies):.2%} on the test examples" if accuracies else "no file"
    lines = [
        f"{result['winner']} for {result['profile']}: {mean}, mean of {len(accuracies)} seed"
        f"{'s' * (len(accuracies) != 1)}; {file['bytes']:,} bytes, of which {file['container']:,} are the container "
        f"(graph, scales, metadata); budget: {', '.join(f'{key} {value:g}' for key, value in budget.items())}.",
        f"{len(result['candidates'])} students and {len(result['methods']['students'])} ways to teach the best were "
        f"tried; the {result['validation']:,} validation examples picked. The {result['test']:,} test examples were "
        "looked at once, for the winner and its control.",
    ]
    if result["unlabeled"]:
        lines.append(
            f"The {' and '.join(result['unlabeled'])} examples had no labels: what is called accuracy there is "
            "agreement with the teacher."
        )
    if result["verdict"]:
        lines.append(f"{AGAINST} {result['verdict']['sentence']}")
    return lines


def save(result: dict, folder: Path) -> None:
    """Writes `shrink.json`, `pareto.json`, `shrink.md` and `shrink.html`."""
    write_text(folder / "shrink.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "pareto.json", json.dumps(result["pareto"], indent=1) + "\n")
    write_text(folder / "shrink.md", to_markdown(result))
    write_text(folder / "shrink.html", render(result))


def to_markdown(result: dict) -> str:
    """The result as Markdown."""
    lines = [f"# {result['winner']} for {result['profile']}", ""]
    for sentence in summary(result):
        lines += [sentence, ""]
    for _, title, content, text in _sections(result):
        lines += [f"## {title}", "", *markdown_table(content), "", text, ""]
    lines += [f"- Command: `{result['command']}`", f"- Data: {result['data']['source']}", *provenance_lines(result), ""]
    return "\n".join(lines)


def render(result: dict) -> str:
    """The page."""
    lines = [line for line in summary(result) if not line.startswith(AGAINST)]
    top = part("best", result["winner"], " ".join(lines), template="run.html")
    if result["verdict"]:
        top = page.verdict_card(result) + top
    sections = [(name, title, table(*content, title) + note(text)) for name, title, content, text in _sections(result)]
    sections.append(("origin", "Recipe and origin", page.origin(result)))
    title = f"kdistill shrink: {result['winner']}"
    return document("shrink", result["profile"], top, sections, title=title, numbers="shrink.json")


def _sections(result: dict) -> list[tuple[str, str, Table, str]]:
    """Id, title, table and a sentence of each part of the report."""
    return [
        (
            "pareto",
            "Checked files: accuracy against cost",
            pareto_table(result),
            "Every file passed the checks of its profile on the validation examples. Accuracies are on the examples "
            "that picked, so that they are a little too good; those of another number of epochs do not compare.",
        ),
        ("seeds", "The winner and its control", seed_table(result), "Files of each seed, on the test examples."),
        (
            "candidates",
            "Students that were tried",
            candidate_table(result),
            "Validation accuracy of the Keras model after each round; costs are those of the untrained file.",
        ),
        (
            "methods",
            "How the winner is taught",
            method_table(result),
            "Trained for as long as the last round, one seed: differences of a few tenths of a point are chance.",
        ),
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
