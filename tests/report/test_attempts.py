"""What repair has tried, in the report of a run."""

import copy

import pytest
from support.outline import Outline
from support.reports import HOSTILE, report

from kdistill.report import page
from kdistill.report.content import check_report
from kdistill.report.markdown import attempt_table, to_markdown
from kdistill.schema import Mismatch

FIRST = {"action": "as it is", "holds": False, "skipped": False, "reason": "it agrees on 91 %", "seconds": 1.5}
FIRST |= {"bytes": 3_400, "microseconds": 7.25, "agreement": 0.91, "accuracy": 0.9, "drop": 0.05}
NOTHING = dict.fromkeys(("bytes", "microseconds", "agreement", "accuracy", "drop"))
SKIPPED = {**FIRST, **NOTHING, "action": HOSTILE, "skipped": True, "reason": "in int8 throughout"}
LAST = {**FIRST, "action": "better calibration", "holds": True, "reason": "", "agreement": 0.9875}


@pytest.fixture
def repaired():
    changed = copy.deepcopy(report())
    changed["files"][0]["attempts"] = [FIRST, SKIPPED, LAST]
    changed["refused"] = [{"name": "own", "reason": "too bad", "advice": "", "check": None, "bytes": None}]
    changed["refused"][0]["attempts"] = [FIRST]
    return changed


def test_each_attempt_is_a_row(repaired):
    check_report(repaired)
    titles, rows = attempt_table(repaired)
    name = repaired["files"][0]["profile"]
    assert titles[:3] == ["file", "attempt", "bytes"]
    assert rows == [
        [name, "as it is", "3,400", "7", "91.00", "90.00", "refused: it agrees on 91 %"],
        [name, HOSTILE, "–", "–", "–", "–", "skipped: in int8 throughout"],
        [name, "better calibration", "3,400", "7", "98.75", "90.00", "holds its limits"],
        ["own", "as it is", "3,400", "7", "91.00", "90.00", "refused: it agrees on 91 %"],
    ]
    assert "| better calibration | 3,400 | 7 | 98.75 | 90.00 | holds its limits |" in to_markdown(repaired)
    text = Outline(page.render(repaired)).text
    assert "better calibration" in text and "until it holds its limits" in text
    assert HOSTILE not in page.render(repaired)
    assert "Repair" not in to_markdown(report()) and attempt_table(report())[1] == []


@pytest.mark.parametrize(
    "change", [{"bytes": -1}, {"agreement": 1.5}, {"action": 3}, {"holds": None}, {"seconds": "1"}]
)
def test_damaged_attempts_are_refused(repaired, change):
    repaired["files"][0]["attempts"][0] = {**FIRST, **change}
    with pytest.raises(Mismatch, match="attempts"):
        check_report(repaired)
