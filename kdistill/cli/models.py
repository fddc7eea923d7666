"""The commands about model files: evaluate, benchmark, inspect, export, compress."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import (
    DataDir,
    DataName,
    Download,
    Json,
    command,
    data_of,
    import_tensorflow,
    say_to,
    show,
    show_table,
)
from kdistill.errors import InputError, unknown


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
    from kdistill.evaluation.evaluate import evaluate as measured
    from kdistill.evaluation.evaluate import predict

    if any(name and not name.endswith(".tflite") for name in (model, teacher)):
        import_tensorflow()
    splits = data_of(data, data_dir, download, say_to(as_json))
    teacher_logits = predict(teacher, splits.test.images) if teacher else None
    row = {"name": Path(model).name, **measured(model, splits.test, teacher_logits=teacher_logits)}
    show([row], as_json, row)


@command
def benchmark(
    file: Annotated[Path, typer.Argument(help="A .tflite file.")],
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads; may be repeated. Default: 1 2")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Another .tflite, measured by turns with this one.")] = None,
    as_json: Json = False,
):
    """Time, memory and size of a .tflite on this machine's CPU, operator by operator; or two files side by side.

    Example: kdistill benchmark npu/student.tflite --baseline reference/student.tflite
    """
    from kdistill.tflite.benchmark import benchmark as measured
    from kdistill.tflite.benchmark import lines

    found = measured(file, tuple(threads or (1, 2)), baseline)
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))


@command
def inspect(
    file: Annotated[Path, typer.Argument(help="A .tflite file.")],
    against: Annotated[
        Path | None, typer.Option(help="The float32 file of the same model: which layers cost most.")
    ] = None,
    data: DataName = "mnist",
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
):
    """What is in a .tflite: operators, precision by layer, what stayed float and why, metadata, oldest runtime.

    The data set is for --against only: the images on which both files are run.
    Example: kdistill inspect runs/mnist-default-1/npu/student.tflite
    """
    from kdistill.tflite.inspection import inspect as inspected
    from kdistill.tflite.inspection import lines

    images = None if against is None else data_of(data, data_dir, download, say_to(as_json)).test.images
    found = inspected(file, against, images)
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))


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
    labels: Annotated[
        Path | None, typer.Option(help="The classes' names, one a line. Default: the data set's.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Told in the file, such as Apache-2.0.")] = None,
    version: Annotated[str | None, typer.Option(help="Of the model, told in the file. Default: 1")] = None,
    as_json: Json = False,
):
    """Convert a Keras model to .tflite files, each checked against the model on the test images.

    Example: kdistill export student.keras --profile npu --profile phone_cpu --out files
    """
    from kdistill.recipe.loading import load_profile

    profiles = [load_profile(name) for name in profile or ["phone_cpu"]]
    import_tensorflow()
    from kdistill.networks import saving

    splits = data_of(data, data_dir, download, say_to(as_json))
    from kdistill.conversion.verify import export_checked
    from kdistill.evaluation.evaluate import evaluate as measured

    student = saving.load_checked(str(model), splits.train.images.shape[1:], len(splits.class_names))
    names = splits.class_names if labels is None else _labels(labels)
    limits = {
        "max_drop": None if max_drop is None else max_drop / 100,
        "min_agreement": None if min_agreement is None else min_agreement / 100,
    }
    about = {"license": license, "version": version, "data": splits.fingerprint}
    rows, files = [], []
    for each in profiles:
        images, options = splits.train.images, {"class_names": names, "about": about, **limits}
        files.append(export_checked(student, out / each.name, each, images, splits.test, **options))
        rows.append({"name": each.name, **measured(files[-1]["path"], splits.test)})
    show(rows, as_json, files)


def _labels(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"'{path}' is no text in UTF-8; --labels expects one name a line.") from None


@command
def compress(
    model: Annotated[Path, typer.Argument(help="A .keras file.")],
    scheme: Annotated[
        str, typer.Option(help="prune, prune_2_4, cluster, prune_cluster, qat, pqat, cqat, pcqat, int8.")
    ],
    teacher: Annotated[Path | None, typer.Option(help="A .keras file that goes on teaching.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is made.")] = Path("compressed"),
    data: DataName = "mnist",
    data_dir: DataDir = None,
    download: Download = False,
    epochs: Annotated[int, typer.Option(min=1, help="Of fine-tuning, in each step of the scheme.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, from which a cosine leads to zero.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 128,
    shift: Annotated[int, typer.Option(min=0, help="Shift training images by up to so many pixels.")] = 0,
    weight: Annotated[float | None, typer.Option(help="The teacher's share of the loss. Default: 0.9")] = None,
    temperature: Annotated[float | None, typer.Option(help="The teacher's temperature. Default: 4")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros after pruning. Default: 0.8")] = None,
    clusters: Annotated[int | None, typer.Option(help="Values of each clustered kernel. Default: 16")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A layer to leave alone; may be repeated.")] = None,
    layer_sparsity: Annotated[list[str] | None, typer.Option(help="LAYER=SHARE; may be repeated.")] = None,
    layer_clusters: Annotated[list[str] | None, typer.Option(help="LAYER=NUMBER; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of order, augmentation and clusters.")] = 0,
    as_json: Json = False,
):
    """Prune, cluster or quantize a Keras model while its teacher goes on teaching; writes model, .tflite and table.

    A compression that was interrupted goes on behind its last finished step when the same command is given again.

    Example: kdistill compress student.keras --scheme pcqat --teacher teacher.keras --out small
    """
    from kdistill.recipe import SCHEMES, Data

    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    told = {"--weight": weight, "--temperature": temperature}
    idle = [name for name, value in told.items() if value is not None and teacher is None]
    idle += ["--teacher"] if teacher and not SCHEMES[scheme] else []
    if idle:
        raise InputError(
            f"{idle[0]} does nothing without a teacher who teaches while something is trained. Leave it out."
        )
    options = {"final_sparsity": sparsity, "clusters": clusters, "skip": tuple(skip or ()), "seed": seed}
    options |= {"layer_sparsity": _by_layer(layer_sparsity, "--layer-sparsity", float)}
    options |= {"layer_clusters": _by_layer(layer_clusters, "--layer-clusters", int)}
    options |= {"distillation_weight": 0.9 if weight is None else weight}
    options |= {"temperature": 4.0 if temperature is None else temperature}
    import_tensorflow()
    from kdistill.networks import saving
    from kdistill.report.markdown import layers
    from kdistill.runs import compressions

    say = say_to(as_json)
    splits = data_of(data, data_dir, download, say)
    shape, classes = splits.train.images.shape[1:], len(splits.class_names)
    student = saving.load_checked(str(model), shape, classes)
    teaches = None if teacher is None else saving.load_checked(str(teacher), shape, classes)
    options |= {"learning_rate": learning_rate, "batch_size": batch_size, "augment": Data(shift=shift)}
    found = compressions.to_folder(student, scheme, teaches, splits, out, epochs=epochs, say=say, **options)
    if not as_json:
        show_table(*layers(found["stages"]))
        for note in found["notes"]:
            print(note)
    show(found["models"], as_json, found)


def _by_layer(settings: list[str] | None, option: str, kind: type) -> dict:
    """`["conv1=0.5"]` -> `{"conv1": 0.5}`."""
    found = {}
    for setting in settings or []:
        layer, _, number = setting.rpartition("=")
        try:
            found[layer] = kind(number)
        except ValueError:
            layer = ""
        if not layer:
            raise InputError(f"{option} expects LAYER={kind.__name__.upper()}, received '{setting}'.")
    return found
