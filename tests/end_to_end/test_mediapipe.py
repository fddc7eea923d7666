"""MediaPipe's ImageClassifier, in an environment of its own, gives the names and the scores that LiteRT gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.small_models import CLASSES, corners, network

from kdistill.conversion.export import export
from kdistill.tflite.interpreter import File

PYTHON = os.environ.get("KDISTILL_MEDIAPIPE_PYTHON")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mediapipe_check.py"


@pytest.mark.skipif(not PYTHON, reason="KDISTILL_MEDIAPIPE_PYTHON names no Python that has MediaPipe")
def test_mediapipe_names_the_classes(tmp_path):
    made = export(network(), tmp_path, "mediapipe", class_names=CLASSES)
    images = np.repeat(corners(6, seed=2).images, 3, axis=-1)
    np.save(tmp_path / "images.npy", images)
    command = [PYTHON, SCRIPT, made["path"], tmp_path / "images.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, expected = json.loads(done.stdout), File(made["path"]).predict(images)
    assert [row[0][0] for row in rows] == [CLASSES[i] for i in expected.argmax(axis=1)]
    np.testing.assert_allclose([row[0][1] for row in rows], expected.max(axis=1), atol=1e-4)


def test_without_mediapipe_the_script_says_so(tmp_path):
    """This environment has none: MediaPipe cannot live beside the pinned set."""
    done = subprocess.run([sys.executable, SCRIPT, "x.tflite"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("skipped: MediaPipe is not installed")
