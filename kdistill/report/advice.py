"""What a report means in plain words, and what to try next: rules, each with the numbers that it looks at."""

MOST = 3  # hints of one page
POOR_ECE = 0.05  # expected calibration error from which a hint follows
FEW = 5  # test images: a difference of fewer cannot be shown with one seed (McNemar's mid-p at 5 %)


def headline(verdict: dict) -> str:
    """The verdict without statistics, such as "Distillation helped: +1.8 points, sure beyond other seeds"."""
    difference, metric = verdict["difference"], verdict.get("metric")
    size = f"{difference:+.3g} of {metric}" if metric else f"{round(100 * difference, 2):+.2g} points"
    several = verdict["seeds"] > 1
    if verdict["word"] in ("BETTER", "WORSE"):
        effect = "helped" if verdict["word"] == "BETTER" else "hurt"
        return f"Distillation {effect}: {size}, {'sure beyond other seeds' if several else 'on these examples'}"
    if verdict["word"] == "EQUIVALENT":
        return f"Distillation makes no difference that counts: {size}"
    return f"Student and control cannot be told apart: {size}, which chance explains"


def hints(report: dict) -> list[str]:
    """What to try next, at most three, the most important first; one line if nothing is wrong."""
    if not report.get("verdict"):
        return []
    rules = (_weak_teacher, _low_agreement, _small_gap, _poor_calibration)
    texts = [text for text in (rule(report) for rule in rules) if text]
    if not texts and report["verdict"]["word"] == "BETTER":
        texts = ["Nothing stands in the way. Next: kdistill compress keeps the teacher on while the student shrinks."]
    return texts[:MOST]


def _model(report: dict, name: str) -> dict:
    return next((row for row in report.get("models", ()) if row.get("name") == name), {})


def _weak_teacher(report: dict) -> str:
    teacher, control = (_model(report, name).get("accuracy") for name in ("teacher", "control"))
    if teacher is None or control is None or teacher > control:
        return ""
    return (
        f"The teacher ({teacher:.2%}) is not ahead of the control ({control:.2%}): there is little to learn from it. "
        "Take a larger teacher, or one that was trained on more data (--teacher FILE). kdistill plan compares them."
    )


def _low_agreement(report: dict) -> str:
    teacher, agreement = _model(report, "teacher").get("accuracy"), _model(report, "student").get("agreement")
    if report["data"].get("head") is not None:  # a share of positions or labels
        return ""
    if teacher is None or agreement is None or 1 - agreement <= max(0.02, 2 * (1 - teacher)):
        return ""
    return (
        f"The student gives the teacher's class on {agreement:.1%} of the images only: it has not learned yet what the "
        "teacher knows. Train longer (training.epochs), take a larger student, or a higher distillation weight."
    )


def _small_gap(report: dict) -> str:
    verdict, images = report["verdict"], report["data"]["test"]
    if verdict["word"] in ("BETTER", "WORSE"):
        return (
            ""
            if verdict["seeds"] > 1
            else "One seed is about these examples only. Add some: --resume --out FOLDER --seeds 5."
        )
    more = verdict.get("more_seeds")
    if more:
        return (
            f"About {more} more seed{'s' if more > 1 else ''} would likely decide: --resume --out FOLDER --seeds "
            f"{verdict['seeds'] + more}."
        )
    count = abs(verdict["difference"]) * images
    if not verdict.get("metric") and count < FEW:
        return (
            f"The difference is {count:.2g} of {images:,} test images, too small to be shown by so few. Use a larger "
            "test set, or more seeds (--seeds 3..10)."
        )
    return "Use more seeds (--seeds 3..10), or a larger test set." if verdict["word"] == "UNDECIDED" else ""


def _poor_calibration(report: dict) -> str:
    for name, advice in (
        ("teacher", "Raise distill.temperature, so that it says more about the wrong classes"),
        ("student", "Do not read its probabilities as such before temperature scaling on validation images"),
    ):
        error = _model(report, name).get("ece")
        if error is not None and error > POOR_ECE:
            return f"The confidence of the {name} is off by {100 * error:.1f} points. {advice}."
    return ""
