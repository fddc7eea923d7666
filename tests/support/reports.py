"""A small report as a run writes it, made by hand: four classes, two seeds, names that a page has to escape."""

import numpy as np

from kdistill.evaluation import disagreement, verdict

HOSTILE = '<script>alert("x")</script>'
NAMES = ["cat", "dog & cow", HOSTILE, "a very long name of a class, of which a chart shows the beginning"]


def _history(first: float, epochs: int, **more) -> dict:
    accuracy = [1 - first / (epoch + 1) for epoch in range(epochs)]
    return {"accuracy": accuracy, "val_accuracy": accuracy, "val_hard": [2 * (1 - a) for a in accuracy], **more}


def _about(confusion: list[list[int]]) -> dict:
    counts = [0] * 13 + [20, 60]
    return {
        "confusion": confusion,
        "per_class": [row[i] / sum(row) for i, row in enumerate(confusion)],
        "entropy": 0.2,
        "reliability": {
            "confidence": [None] * 13 + [0.91, 0.99],
            "accuracy": [None] * 13 + [0.85, 1.0],
            "count": counts,
        },
    }


def _row(name: str, accuracy: float, **more) -> dict:
    row = {"name": name, "accuracy": accuracy, "top5": 1.0, "ece": 0.0123, "agreement": 0.975, "kl": 0.05}
    return {**row, "parameters": None, "bytes": None, "microseconds": 50.0, **more}


def _file(profile: str, size: int, **more) -> dict:
    check = {"accuracy": 0.95, "drop": 0.0125, "agreement": 0.9875, "max_difference": 0.25}
    kinds = {"input": {"type": "int8"}, "output": {"type": "int8"}}
    file = {"path": f"{profile}/student.tflite", "profile": profile, "bytes": size, "sha256": "0123456789abcdef" * 4}
    return {**file, **kinds, "min_runtime": "2.3.0", "float_layers": [], "check": check, **more}


def report() -> dict:
    """What `report.json` holds."""
    right = [[20, 0, 0, 0], [1, 18, 1, 0], [0, 0, 20, 0], [0, 2, 0, 18]]
    stayed = [{"layer": HOSTILE, "operator": "CONV_2D", "reason": "few <b>elements</b>"}]
    training = {
        "teacher": {"seconds": 12.0, "steps": 30, "history": _history(0.2, 3)},
        "control": {"seconds": 8.0, "steps": 40, "history": _history(0.4, 4)},
        "student": {"seconds": 9.0, "steps": 40, "history": _history(0.3, 4, val_kd=[2.0, 1.0, 0.5, 0.25])},
        "control-1": {"seconds": 8.0, "steps": 40, "history": _history(0.45, 4)},
        "student-1": {"seconds": 9.0, "steps": 40, "history": _history(0.35, 4, val_kd=[2.5, 1.0, 0.5, 0.0])},
    }
    return {
        "recipe": {"name": HOSTILE, "variant": "default", "seed": 3, "seeds": 2, "precision": "float32"}
        | {"data": {"name": "npz", "teacher_labels": "all"}, "distill": {"temperature": 4.0}},
        "command": f"kdistill run '{HOSTILE}'",
        "machine": "a machine, 2 cores",
        "versions": {"python": "3.11.7", "keras": "3.15.1"},
        "commit": None,
        "data": {"source": "an .npz & more", "fingerprint": "88b5", "class_names": NAMES, "train": 200}
        | {"validation": 40, "test": 80, "labeled": 240, "unlabeled": 0},
        "training": training,
        "verdict": verdict.judge([0.95, 0.975], [0.9125, 0.9275], 80),
        "models": [
            _row("teacher", 0.9875, parameters=40_000),
            _row("control", 0.9125, parameters=2_000),
            _row("student", 0.95, parameters=2_000),
            _row("npu", 0.95, bytes=3_456, microseconds=7.5),
            _row("reference", 0.95, bytes=9_876, microseconds=9.5),
            _row(HOSTILE, 0.9, bytes=5_555, microseconds=8.5),
        ],
        "diagnostics": {name: _about(right) for name in ("teacher", "control", "student", "student-1")},
        "differences": {"images": 80, "count": 2, "student_right": 1, "teacher_right": 0}
        | {
            "pictures": [
                {"file": f"differences/00000{i}.png", "index": i, "label": 2, "student": 2 - i, "teacher": 3}
                | {"student_confidence": 0.75, "teacher_confidence": 0.5}
                for i in range(2)
            ]
        },
        "files": [_file("npu", 3_456), _file(HOSTILE, 5_555, float_layers=stayed)],
    }


def images() -> dict[str, bytes]:
    """The pictures that the report names."""
    return {
        f"differences/00000{i}.png": disagreement.png(np.full((8, 8, 1 + 2 * i), 40 + 100 * i, np.uint8))
        for i in range(2)
    }
