"""The page of evidence agrees with itself and with README; what does not agree is named. See benchmarks/claims.py."""

import json
from pathlib import Path

import pytest
from support.scripts import benchmark

claims = benchmark("claims")
ROOT = Path(__file__).parents[1]
README, PAGE = ((ROOT / path).read_text() for path in ("README.md", "docs/experiments.md"))
ROW = "| a | `b` | 3 | 98.38 | 98.83 | +0.45, +0.33 to +0.57 | BETTER | B, 2026-11-26 |"
HEAD = "| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |\n|---|---|---|---|---|---|---|---|\n"
OTHERS = "## Other figures\n\n| 1 | 2 | 3 | 4 |\n|---|---|---|---|\n| c | 15,784 bytes | `d` | A, 2026-11-25 |\n"


def findings(row: str, readme: str = "") -> list[str]:
    return claims.check(readme, f"## Claims\n\n{HEAD}{row}\n\n{OTHERS}")


def test_readme_and_the_page_agree(capsys):
    assert claims.check(README, PAGE) == []
    assert claims.main([]) == 0 and "README agrees" in capsys.readouterr().out
    assert len(claims.figures(README)) > 10


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("98.83", "98.93", "98.93 less 98.38 is not +0.45"),
        ("+0.33", "+0.47", "the difference is outside of its interval"),
        ("+0.33", "-0.33", "the interval does not give BETTER"),
        ("BETTER", "UNDECIDED", "the interval does not give UNDECIDED"),
        ("BETTER", "EQUIVALENT", "the interval does not give EQUIVALENT"),
        ("`b`", "b", "expected a command"),
        ("| 3 |", "| |", "expected a command, a number of seeds"),
        (" to +0.57", "", "expected a command, a number of seeds, and a difference"),
        ("B, 2026-11-26", "B", "expected machine and date, received 'B'"),
        ("| a ", "", "expected 8 cells, received 7"),
    ],
)
def test_a_row_that_does_not_hold_together(old, new, message):
    assert findings(ROW) == []
    (finding,) = findings(ROW.replace(old, new))
    assert message in finding


def test_figures_of_readme_without_a_row():
    fine = "It gains +0.45 points, 98.83 % (Python 3.11 to 3.13, `1.5`, [x](3.5.md)): 15,784 bytes.\n"
    fine += "```text\n97.20%\n```\n"
    assert findings(ROW, fine) == []
    assert findings(ROW, fine.replace("0.45", "0.46")) == ["README states 0.46, which is in no row"]
    assert findings(ROW, "| 98.83% | 15,785 |") == ["README states 15,785, which is in no row"]
    assert claims.check("", "no tables") == ["expected tables under '## Claims' and '## Other figures'"]


def test_the_row_of_a_run_is_a_whole_claim(tmp_path, capsys):
    verdict = {"word": "BETTER", "seeds": 2, "control": [0.75, 0.76], "student": [0.77, 0.775]}
    verdict |= {"difference": 0.0175, "low": 0.001, "high": 0.034, "level": 0.95}
    command = "kdistill run /x/cifar10.py --variant tiny --data-dir /x/data --teacher /x/t.keras --seeds 2 --out /x/run"
    (tmp_path / "report.json").write_text(json.dumps({"command": command, "verdict": verdict}))
    assert claims.main(["--row", str(tmp_path), "B"]) == 0
    row = capsys.readouterr().out.strip()
    assert "`kdistill run cifar10 --variant tiny --data-dir FOLDER --teacher FILE --seeds 2`" in row
    assert "| 2 | 75.50 | 77.25 | +1.75, +0.10 to +3.40 | BETTER | B, 20" in row and "/x" not in row
    assert findings(row) == [] and findings(row.replace("77.25", "77.35"))


def test_a_row_states_the_interval_of_two_one_sided_tests():
    verdict = {"word": "EQUIVALENT", "seeds": 2, "control": [0.75, 0.76], "student": [0.75, 0.761], "level": 0.9}
    verdict |= {"difference": 0.0005, "low": -0.0006, "high": 0.0016}
    row = claims.row_of({"command": "kdistill run mnist --seeds 2", "verdict": verdict}, "B", "2026-11-27")
    assert "| +0.05, -0.06 to +0.16 (90 %) | EQUIVALENT |" in row
    assert findings(row) == [] and findings(row.replace("+0.16", "+0.26"))
