"""The report of a sweep: table, markdown, page."""

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path

from kdistill.files import write_text
from kdistill.report import page
from kdistill.report.html import document, table

TITLES = {
    "accuracy_by_setting": "Test accuracy by setting: means over the seeds, in bands from the lowest to the highest.",
    "first_steps": "Accuracy on validation images over the first steps, for each weight of the teacher's term.",
    "losses": "Hard loss and teacher's loss over the training, each divided by its own maximum.",
}


def table_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table: teacher, control, and one row for each setting."""
    keys = [key.split(".")[-1] for key in result["grid"]]
    published = dict(map(tuple, result["recipe"]["published"]))
    several = len(result["seeds"]) > 1
    titles = [
        *keys,
        "validation %",
        "test %",
        *(["lowest", "highest"] if several else []),
        "agreement %",
        "KL",
        "ECE %",
    ]
    titles += ["published %"] if published else []
    dashes = ["–"] * (len(keys) - 1)
    teacher = result["teacher"]["accuracy"]
    cells = [
        ["teacher", *dashes, "–", f"{100 * teacher:.2f}", *["–"] * (5 if several else 3), *_known(published, "teacher")]
    ]
    for student in result["students"]:
        for values in student["settings"] or [None]:
            first = list(values.values()) if values else ["control", *dashes]
            name = student["name"] if not values else ",".join(f"{k}={v}" for k, v in zip(keys, first, strict=True))
            cells.append([*first, *_numbers(student, several), *_known(published, name)])
    return titles, cells


def _known(published: dict, name: str) -> list[str]:
    if not published:
        return []
    return [f"{100 * published[name]:.2f}" if name in published else "–"]


def _numbers(student: dict, several: bool) -> list[str]:
    if not all(student["test"]):
        step = (
            next(step for step in student["broken_steps"] if step is not None)
            if any(step is not None for step in student["broken_steps"])
            else "?"
        )
        return ["–", f"not finite from step {step}", *["–"] * (5 if several else 3)]

    def mean(part: str, key: str) -> float | None:
        values = [each.get(key) for each in student[part]]
        return None if None in values else sum(values) / len(values)

    tests = [each["accuracy"] for each in student["test"]]
    spread = [f"{100 * min(tests):.2f}", f"{100 * max(tests):.2f}"] if several else []
    found = [f"{100 * mean('validation', 'accuracy'):.2f}", f"{100 * mean('test', 'accuracy'):.2f}", *spread]
    for key, pattern, factor in (("agreement", "{:.2f}", 100), ("kl", "{:.4f}", 1), ("ece", "{:.2f}", 100)):
        value = mean("test", key)
        found.append("–" if value is None else pattern.format(factor * value))
    return found


def markdown(result: dict, pictures: list[str]) -> str:
    """The sweep as Markdown."""
    titles, cells = table_rows(result)
    passes = result["cost"]["passes"]
    seconds = sum(each["seconds"] for each in passes)
    students = sum(each["students"] for each in passes)
    best = result["best"]
    lines = [
        f"# Sweep of {result['recipe']['name']} ({result['recipe']['variant']})",
        "",
        f"Best on validation: **{best}**. On the test images, which had no part in choosing it, against the control: "
        f"{result['verdict']['sentence']}"
        if best and result["verdict"]
        else "No student is whole: see the table.",
        "",
        *[line for name in pictures for line in (TITLES[name], "", f"![{name}]({name}.png)", "")],
        "| " + " | ".join(titles) + " |",
        "|---" * len(result["grid"]) + "|---:" * (len(titles) - len(result["grid"])) + "|",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        f"Means over {len(result['seeds'])} seed(s): {', '.join(map(str, result['seeds']))}; one teacher. Settings "
        "that are one student (any temperature with weight 0) were trained once. The control is trained on "
        "labels alone, with the recipe's own settings.",
        "",
        f"Cost: {students} students in {len(passes)} pass(es) of the data, {seconds:,.0f} s in all; every batch went "
        "through the teacher once for all students of its pass.",
        "",
        f"- Command: `{result['command']}`",
        f"- Data: {result['data']['source']}; fingerprint {result['data']['fingerprint']}; "
        f"{result['data']['train']:,} training ({result['data']['labeled']:,} labeled), "
        f"{result['data']['validation']:,} validation, {result['data']['test']:,} test images",
        f"- Machine: {result['machine']}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
        f"- Commit: {result['commit'] or 'not known'}",
        "",
    ]
    return "\n".join(lines)


def save_markdown(result: dict, pictures: list[str], folder: Path) -> None:
    """Writes `sweep.json` and `sweep.md`."""
    write_text(folder / "sweep.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "sweep.md", markdown(result, pictures))


def save(result: dict, pictures: list[str], folder: Path) -> None:
    """Writes `sweep.json`, `sweep.md` and `sweep.html`; the named pictures are in the folder as .png."""
    save_markdown(result, pictures, folder)
    content = {name: (folder / f"{name}.png").read_bytes() for name in pictures}
    write_text(folder / "sweep.html", html(result, content))


def html(result: dict, pictures: Mapping[str, bytes]) -> str:
    """The page of a sweep; `pictures` are PNG files by name."""
    recipe, best = result["recipe"], result["best"]
    title = f"Sweep of {recipe['name']} ({recipe['variant']})"
    top = f"<p>Best on validation, which had to choose: <strong>{escape(best)}</strong>.</p>" if best else ""
    note = (
        f"Means over {len(result['seeds'])} seed(s); one teacher. The test images had no part in choosing. The control "
        "is trained on labels alone, with the recipe's own settings."
    )
    students = table(*table_rows(result), "Students") + f'<p class="note">{note}</p>'
    sections = [
        ("pictures", "Pictures", "".join(_picture(name, content, best) for name, content in pictures.items())),
        ("students", "Teacher, control and students", students),
        ("origin", "Recipe and origin", page.origin(result)),
    ]
    head = f"<h1>{escape(recipe['name'])} <small>{escape(recipe['variant'])}, sweep</small></h1>"
    return document(title, head, page.verdict_card(result) + top, sections)


def _picture(name: str, content: bytes, best: str | None) -> str:
    told = TITLES[name]
    data, alt = (
        base64.b64encode(content).decode(),
        f"{told} The best on validation is {best}; the table has all numbers.",
    )
    return (
        f'<figure class="picture"><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
        f"<figcaption>{escape(told)}</figcaption></figure>"
    )
