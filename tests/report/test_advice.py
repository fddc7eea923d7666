"""The verdict in plain words, and hints by rules."""

import pytest
from support.reports import report

from kdistill.evaluation import verdict
from kdistill.report import advice, page


def judged(student, control, images=10_000, **options) -> dict:
    return verdict.judge(student, control, images, **options)


SEEDS = ([0.95, 0.952, 0.951], [0.93, 0.933, 0.9315])


@pytest.mark.parametrize(
    "judgement,text",
    [
        (judged(*SEEDS), "Distillation helped: +1.9 points, sure beyond other seeds"),
        (judged(*SEEDS[::-1]), "Distillation hurt: -1.9 points, sure beyond other seeds"),
        (judged([0.95], [0.93], discordant=(250, 50)), "Distillation helped: +2 points, on these examples"),
        (
            judged([0.95, 0.96], [0.96, 0.95]),
            "Student and control cannot be told apart: +0 points, which chance",
        ),
        (
            judged([0.95, 0.9502, 0.9498], [0.95, 0.9501, 0.9499]),
            "Distillation makes no difference that counts: ",
        ),
        (judged([1.0, 1.01], [2.0, 2.02], metric="mse"), "Distillation helped: -1 of mse, sure beyond other seeds"),
    ],
)
def test_the_headline(judgement, text):
    assert advice.headline(judgement).startswith(text)


def changed(judgement=None, test=10_000, **models) -> dict:
    """The report with another verdict, and other numbers of its models."""
    base = report()
    base["models"][2]["agreement"] = 0.985  # of the student
    for name, numbers in models.items():
        next(row for row in base["models"] if row["name"] == name).update(numbers)
    return {**base, "verdict": judgement or judged(*SEEDS), "data": {**base["data"], "test": test}}


def test_a_run_without_faults_gets_the_next_step_only():
    (hint,) = advice.hints(changed())
    assert hint.startswith("Nothing stands in the way.")


@pytest.mark.parametrize(
    "case,beginning",
    [
        (changed(teacher={"accuracy": 0.9}), "The teacher (90.00%) is not ahead of the control (91.25%)"),
        (changed(teacher={"accuracy": 0.9125}), "The teacher (91.25%) is not ahead"),
        (changed(student={"agreement": 0.9}), "The student gives the teacher's class on 90.0% of the images only"),
        (
            changed(teacher={"ece": 0.08}),
            "The confidence of the teacher is off by 8.0 points. Raise distill",
        ),
        (changed(student={"ece": 0.2}), "The confidence of the student is off by 20.0 points."),
        (changed(judged([0.95], [0.93], discordant=(250, 50))), "One seed is about these examples only."),
        (
            changed(judged([0.95, 0.96, 0.953], [0.951, 0.953, 0.95])),
            "About 13 more seeds would likely decide: --resume --out FOLDER --seeds 16.",
        ),
        (
            changed(judged([0.9885, 0.9885, 0.9875], [0.972, 0.9805, 0.979], 2_000), 2_000),
            "About 1 more seed would likely decide: --resume --out FOLDER --seeds 4.",
        ),
        (changed(judged([0.951], [0.95], 1_000, discordant=(2, 1)), 1_000), "The difference is 1 of 1,000 test images"),
        (changed(judged([0.96], [0.95], 1_000, discordant=(60, 50)), 1_000), "Use more seeds (--seeds 3..10)"),
    ],
)
def test_each_rule_gives_its_hint_and_no_other(case, beginning):
    (hint,) = advice.hints(case)
    assert hint.startswith(beginning)


def test_hints_are_at_most_three_and_stand_on_the_page_before_the_folded_statistics():
    worst = changed(
        judged([0.951], [0.95], 1_000, discordant=(2, 1)),
        1_000,
        teacher={"accuracy": 0.5, "ece": 0.3},
        student={"agreement": 0.01},
    )
    # A teacher of 50 % is followed too well for a second hint.
    assert [hint.split()[1] for hint in advice.hints(worst)] == ["teacher", "difference", "confidence"]
    text = page.render(worst)
    parts = ("cannot be told apart", "What to do next", "<summary>The statistics", "UNDECIDED")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


@pytest.mark.parametrize("part", ("verdict", "models"))
def test_a_report_without_it_has_no_hints_from_it(part):
    lacking = report()
    del lacking[part]
    assert all("teacher" not in hint for hint in advice.hints(lacking))
