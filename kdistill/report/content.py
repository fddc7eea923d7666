"""What `report.json` contains: its schema, and its lists that have to agree. A page is made of nothing else.

Reports of earlier versions lack some keys, which are marked by `?`.
"""

import math
import re

from kdistill import schema
from kdistill.schema import Between, Mapping, Matching, Whole

NUMBER = Between(-1e15, 1e15)  # charts compute with it, and with its tenfold
SHARE = Between(0, 1)
COUNT = Whole(0)
MOST_CLASSES = 100_000

CHECK = {"accuracy?": (SHARE, None), "max_drop?": NUMBER, "min_agreement?": NUMBER, "note?": (str, None)}
CHECK |= {"resolution?": (str, None), "drop?": NUMBER, "agreement?": SHARE, "max_difference?": (NUMBER, None)}
NUMBERS = {"top5?": (SHARE, None), "agreement?": (SHARE, None), "kl?": (NUMBER, None), "ece?": (SHARE, None)}
POSITIVE = (Between(1e-12, 1e15), None)
NUMBERS |= {"parameters?": (Whole(0), None), "bytes?": (Whole(1), None), "deflated?": (Whole(1), None)}
NUMBERS |= {"microseconds?": POSITIVE}
# Of heads other than one class for an example; of several outputs `outputs` has those of each.
OF_HEADS = {"accuracy?": (SHARE, None), "mean_iou?": (SHARE, None), "auc?": (SHARE, None), "f1?": (SHARE, None)}
OF_HEADS |= {"mse?": (Between(0, 1e30), None), "mae?": (Between(0, 1e30), None), "agreement?": (Between(-1, 1), None)}
MODEL = {"name": str, **NUMBERS, **OF_HEADS, "outputs?": Mapping({**NUMBERS, **OF_HEADS})}
REFUSED_MODEL = {"name": str, "accuracy?": (SHARE, None), "bytes?": None}
# A metric may be infinite or NaN: charts leave such a point out.
METRIC = (NUMBER, Matching(lambda value: type(value) is float and not math.isfinite(value), "no finite number"))
FIT = {"seconds": Between(0, 1e12), "history?": Mapping([METRIC]), "warning?": (str, None)}
VERDICT = {
    "word": str,
    "headline?": str,
    "sentence": str,
    "seeds": Whole(1, 10_000),
    "metric?": str,
    "student": [Between(0, 1e30)],
    "control": [Between(0, 1e30)],
    "difference": NUMBER,
    "low": NUMBER,
    "high": NUMBER,
    "level": SHARE,
}
DATA = {
    "source": str,
    "fingerprint": str,
    "test": Whole(1),
    "train": COUNT,
    "validation": COUNT,
    "labeled?": COUNT,
    "unlabeled?": COUNT,
    "class_names?": [str],
    "head?": (str, Mapping(str), None),
}
CALIBRATION = {"ece": SHARE, "nll": NUMBER}
DIAGNOSTICS = {
    "confusion?": [[COUNT]],
    "per_class?": [(SHARE, None)],
    "reliability?": {"confidence": [(SHARE, None)], "accuracy": [(SHARE, None)], "count": [COUNT]},
    "scaling?": {"temperature": NUMBER, "at_bound": bool, "before": CALIBRATION, "after": CALIBRATION},
}
PICTURE = {"file": str, "index": COUNT, "label": COUNT, "student": COUNT, "teacher": COUNT}
PICTURE |= {"student_confidence": SHARE, "teacher_confidence": SHARE}
DIFFERENCES = {"images": COUNT, "count": COUNT, "student_right": COUNT, "teacher_right": COUNT, "pictures": [PICTURE]}
EXAMPLE = {"file": str, "index": COUNT, "score": NUMBER}
EXAMPLE |= {"label?": [str], "teacher?": [str], "student?": [str]}
# What the report shows of test examples, by output.
EXAMPLES = {"output": str, "kind": str, "names?": [str], "pictures?": [EXAMPLE], "points?": [[NUMBER]]}
# A row of what `kdistill.repair` has tried for a file.
ATTEMPT = {"action": str, "holds": bool, "skipped": bool, "reason": str, "seconds": Between(0, 1e12)}
ATTEMPT |= {"bytes": (Whole(1), None), "microseconds": (NUMBER, None), "agreement": (SHARE, None)}
ATTEMPT |= {"accuracy": (SHARE, None), "drop": (NUMBER, None)}
LAYER = {"layer": str, "kind": str, "parameters": COUNT, "sparsity": (SHARE, None), "clusters?": (COUNT, None)}
LAYER |= {"pruned?": str, "clustered?": str, "quantized?": str}
FILE = {
    "path": str,
    "profile?": str,
    "bytes?": Whole(1),
    "input?": {"type": str},
    "output?": {"type": str},
    "check?": (CHECK, None),
    "float_layers?": ([{"layer?": (str, None), "operator?": str, "reason?": str}], None),
    "min_runtime?": (str, None),
    "sha256?": str,
    "attempts?": [ATTEMPT],
}
REFUSED = {"name": str, "reason": str, "advice": str, "check?": (CHECK, None), "bytes?": (Whole(1), None)}
REFUSED |= {"attempts?": [ATTEMPT]}
COMPRESSED = {"seconds": Between(0, 1e12), "scheme": str, "notes": [str], "layers": [LAYER], "teacher": bool}
COMPRESSED |= {"file": (FILE, None), "refused": (REFUSED, None)}
METRICS = {"accuracy": SHARE, "agreement?": (SHARE, None), "kl?": (NUMBER, None), "ece?": (SHARE, None)}
STUDENT = {
    "parameters": COUNT,
    "broken_step": (COUNT, None),
    "right": Matching(lambda text: isinstance(text, str) and re.fullmatch("([0-9a-f]{2})*", text), "bytes as text"),
    "validation": ({"accuracy": SHARE, "nll": NUMBER}, None),
    "test": (METRICS, None),
}
# The record of a pass of a sweep, by `seed/name` of the student.
PASS = {
    "students": Mapping(STUDENT),
    "curves": Mapping(Mapping([(NUMBER, None)])),
    "cost": {"seconds": Between(0, 1e12), "students": COUNT, "steps": COUNT, "memory": Mapping(NUMBER)},
}
REPORT = {
    "recipe": {"name": str, "variant": str, "seed?": Whole(), "seeds?": Whole(), "data?": {"teacher_labels?": str}},
    "command": str,
    "machine?": (str, None),
    "versions?": Mapping(str),
    "commit?": (str, None),
    "data": DATA,
    "training": Mapping(FIT),
    "teachers?": [{"name": str, "file": str, "format": str, "fingerprint": str, "versions": Mapping(str)}],
    "compressions?": (Mapping({"scheme": str, "notes": [str], "layers": [LAYER]}), None),
    "warnings?": ([str], None),
    "verdict?": (VERDICT, None),
    "teacher_advantage?": ({"sentence": str}, None),
    "models": [Matching(lambda row: isinstance(row, dict), "an object")],
    "diagnostics?": Mapping(DIAGNOSTICS),
    "differences?": (DIFFERENCES, None),
    "examples?": [EXAMPLES],
    "files?": ([FILE], None),
    "refused?": ([REFUSED], None),
}


def check_report(report) -> None:
    """Raises `kdistill.schema.Mismatch` if a report does not contain what a page is made of."""
    schema.check(report, REPORT)
    for place, row in enumerate(report["models"]):
        schema.check(row, REFUSED_MODEL if row.get("refused") else MODEL, f"models.{place}")
    verdict = report.get("verdict")
    if verdict:
        _expect(len(verdict["student"]) == len(verdict["control"]) == verdict["seeds"], "verdict", "a value by seed")
    if report["data"].get("unlabeled"):
        schema.check(report, {"recipe": {"data": {"teacher_labels": str}}, "data": {"labeled": COUNT}})
    names = report["data"].get("class_names")
    named = names is None or (len(names) <= MOST_CLASSES and bool(names or report["data"].get("head")))
    _expect(named, "data.class_names", "a name by class")
    for place, section in enumerate(report.get("examples", ())):
        triples = all(len(point) == 3 for point in section.get("points", ()))
        _expect(triples, f"examples.{place}.points", "label, teacher and student")
    for model, values in report.get("diagnostics", {}).items():
        _check_diagnostics(values, f"diagnostics.{model}", None if names is None else len(names))


def _check_diagnostics(values: dict, path: str, classes: int | None) -> None:
    confusion = values.get("confusion")
    if confusion is not None:
        classes = classes or len(confusion)
        square = len(confusion) == classes > 0 and all(len(row) == classes for row in confusion)
        _expect(square, f"{path}.confusion", "a row and a column by class")
        _expect(len(values.get("per_class") or confusion) == classes, f"{path}.per_class", "a value by class")
    bins = values.get("reliability")
    if bins is not None:
        lists = list(zip(*(bins[key] for key in ("count", "confidence", "accuracy")), strict=False))
        alike = len({len(bins[key]) for key in ("count", "confidence", "accuracy")}) == 1
        whole = all(None not in row for row in lists if row[0])
        _expect(alike and whole and any(bins["count"]), f"{path}.reliability", "a confidence and an accuracy by bin")


def _expect(condition: bool, path: str, expected: str) -> None:
    if not condition:
        raise schema.Mismatch(f"'{path}' expects {expected}; its lists have other lengths")
