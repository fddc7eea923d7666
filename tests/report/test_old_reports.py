"""Reports of the time when the verdict had three words are still read and shown."""

import json

import pytest
from support.outline import Outline
from support.reports import report
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.report import compare, page
from kdistill.report.markdown import to_markdown

NUMBERS = "distilled 96.25%, control 95.00%, difference +1.25 points, 95% interval -5.10 to +7.60, p = 0.24"
PROOF = "This is no proof of equality: every difference inside the interval agrees with the measurements."
SEEDS = f"NO DIFFERENCE: {NUMBERS} (paired t-test over seeds: 2 pairs). The student is ahead for 2 of 2 seeds. {PROOF}"
IMAGES = f"NO DIFFERENCE on these images: {NUMBERS} (McNemar's mid-p test over test images). {PROOF}"


def old(seeds: int) -> dict:
    """A report as it was written then: a verdict without headline, margin and more_seeds."""
    verdict = {"word": "NO DIFFERENCE", "unit": "seeds", "test": "a test", "seeds": seeds, "level": 0.95, "p": 0.24}
    verdict |= {"student": [0.9625] * seeds, "control": [0.95] * seeds, "difference": 0.0125}
    verdict |= {"low": -0.051, "high": 0.076, "sentence": SEEDS if seeds > 1 else IMAGES}
    changed = {**report(), "verdict": verdict}
    for key in ("warnings", "teacher_advantage", "refused"):
        changed.pop(key, None)
    return changed


@pytest.mark.parametrize("seeds", (1, 2))
def test_page_markdown_comparison_and_command(seeds, tmp_path):
    outline = Outline(page.render(old(seeds)))
    assert "NO DIFFERENCE" in outline.text and "+1.25" in outline.text and PROOF in outline.text
    assert old(seeds)["verdict"]["sentence"] in to_markdown(old(seeds))
    for name, content in (("then", old(seeds)), ("now", report())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(content))
    runs = compare.load_runs([tmp_path / "then", tmp_path / "now"])
    titles, rows = compare.run_table(runs)
    words = [dict(zip(titles, row, strict=True))["verdict"] for row in rows]
    assert words == ["NO DIFFERENCE", "UNDECIDED"] and "NO DIFFERENCE" in compare.render(runs)
    assert compare.as_dict(runs)["runs"][0]["verdict"] == old(seeds)["verdict"]
    ended = CliRunner().invoke(app, ["report", str(tmp_path / "then")])
    assert ended.exit_code == 0 and "NO DIFFERENCE" in ended.output
