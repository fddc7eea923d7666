"""The commands about model files: evaluate, benchmark, export."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli_base import DataDir, DataName, Download, Json, command, data_of, import_tensorflow, say_to, show


@command
def evaluate(
    model: Annotated[str, typer.Argument(help="A .keras or .tflite file.")],
    data: DataName = "mnist",
    data_dir: DataDir = None,
    download: Download = False,
    teacher: Annotated[str | None, typer.Option(help="A .keras or .tflite file to compare with.")] = None,
    as_json: Json = False,
):
    """Accuracy, agreement, calibration, size and latency of one model on the test images.

    Example: kdistill evaluate runs/mnist-default-1/npu/student.tflite --teacher runs/mnist-default-1/teacher.keras
    """
    from kdistill.evaluate import evaluate as measured
    from kdistill.evaluate import predict

    if any(name and not name.endswith(".tflite") for name in (model, teacher)):
        import_tensorflow()
    splits = data_of(data, data_dir, download, say_to(as_json))
    teacher_logits = predict(teacher, splits.test.images) if teacher else None
    row = {"name": Path(model).name, **measured(model, splits.test, teacher_logits=teacher_logits)}
    show([row], as_json, row)


@command
def benchmark(
    file: Annotated[Path, typer.Argument(help="A .tflite file.")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    as_json: Json = False,
):
    """Latency of a .tflite on this machine's CPU: the median and the 90th percentile of single images.

    Example: kdistill benchmark runs/mnist-default-1/npu/student.tflite --threads 2
    """
    from kdistill.litert import File

    result = File(file).latency(threads=threads)
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{file}: median {result['median_us']:.0f} µs, p90 {result['p90_us']:.0f} µs, {threads} thread(s)")


@command
def export(
    model: Annotated[Path, typer.Argument(help="A .keras file.")],
    profile: Annotated[list[str] | None, typer.Option(help="A profile's name or .py file; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for <profile>/student.tflite.")] = Path("exports"),
    data: DataName = "mnist",
    data_dir: DataDir = None,
    download: Download = False,
    max_drop: Annotated[float | None, typer.Option(min=0, help="Accuracy it may lose, in points.")] = None,
    min_agreement: Annotated[float | None, typer.Option(min=0, max=100, help="Agreement it must have, in %.")] = None,
    as_json: Json = False,
):
    """Convert a Keras model to .tflite files, each checked against the model on the test images.

    Example: kdistill export student.keras --profile npu --profile phone_cpu --out files
    """
    from kdistill.loading import load_profile

    profiles = [load_profile(name) for name in profile or ["phone_cpu"]]
    import_tensorflow()
    from kdistill import models

    splits = data_of(data, data_dir, download, say_to(as_json))
    from kdistill.evaluate import evaluate as measured
    from kdistill.verify import export_checked

    student = models.load(str(model), splits.train.images.shape[1:], len(splits.class_names))
    limits = {
        "max_drop": None if max_drop is None else max_drop / 100,
        "min_agreement": None if min_agreement is None else min_agreement / 100,
    }
    rows, files = [], []
    for each in profiles:
        images, names = splits.train.images, splits.class_names
        files.append(export_checked(student, out / each.name, each, images, splits.test, class_names=names, **limits))
        rows.append({"name": each.name, **measured(files[-1]["path"], splits.test)})
    show(rows, as_json, files)
