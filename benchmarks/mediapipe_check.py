"""Reads a file of the profile `mediapipe` with MediaPipe's own ImageClassifier, in an environment of its own.

    python -m venv mp && mp/bin/pip install mediapipe
    mp/bin/python benchmarks/mediapipe_check.py files/mediapipe/student.tflite [images.npy]

`images.npy`: uint8 [n, height, width, 3]; noise without it. Prints JSON: for each image its three best
classes by name, with scores. The exit status is 1 if a name is not one of the file's labels. Without MediaPipe it
prints so and checks nothing (exit status 0).
"""

import json
import sys
import zipfile

import numpy as np


def main(path: str, images: str | None = None) -> int:
    try:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as error:
        print(f"skipped: MediaPipe is not installed here ({error})")
        return 0
    with zipfile.ZipFile(path) as archive:
        labels = archive.read("labels.txt").decode().splitlines()
    random = np.random.default_rng(0)
    pixels = np.load(images) if images else random.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    options = vision.ImageClassifierOptions(base_options=BaseOptions(model_asset_path=path), max_results=3)
    rows = []
    with vision.ImageClassifier.create_from_options(options) as classifier:
        for image in pixels:
            picture = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(image))
            categories = classifier.classify(picture).classifications[0].categories
            rows.append([[each.category_name, round(each.score, 6)] for each in categories])
    print(json.dumps(rows))
    return int(any(name not in labels for row in rows for name, _ in row))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
