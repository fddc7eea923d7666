"""The commands about model files: evaluate, benchmark, inspect, export, compress."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import (
    DataDir,
    DataName,
    Download,
    ImageSize,
    Json,
    Mean,
    Std,
    command,
    data_of,
    fail_if_refused,
    import_tensorflow,
    number,
    say_to,
    show,
    show_lines,
    show_table,
)
from kdistill.cli.teacher import network_of, takes_teacher
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe import SCHEMES, Data, Stage
from kdistill.recipe.checks import MOST, MOST_OF_REALS, check_stage
from kdistill.recipe.objective import DISTILLATION_WEIGHT, LARGEST, TEMPERATURE


@command
def evaluate(
    model: Annotated[str, typer.Argument(help="A .keras or .tflite file.")],
    data: DataName = "mnist",
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    download: Download = False,
    teacher: Annotated[str | None, typer.Option(help="A .keras or .tflite file to compare with.")] = None,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
):
    """Accuracy, agreement, calibration, size and latency of one model on the test images.

    --mean and --std are for model and teacher, except for a .tflite that has its normalization inside.

    Example: kdistill evaluate runs/mnist-default-1/npu/student.tflite --teacher runs/mnist-default-1/teacher.keras
    """
    from kdistill.evaluation.evaluate import evaluate as measured
    from kdistill.evaluation.evaluate import predict, takes_raw_pixels

    if any(name and not name.endswith(".tflite") for name in (model, teacher)):
        import_tensorflow()
    splits = data_of(data, data_dir, download, say_to(as_json), image_size)
    stated = {"mean": mean or None, "std": std or None}
    raw = {name: takes_raw_pixels(name) for name in (model, teacher) if name and (mean or std)}

    def own(name: str) -> dict:
        return {} if raw.get(name) and not all(raw.values()) else stated  # where nothing takes them, they are refused

    teacher_logits = predict(teacher, splits.test.images, **own(teacher)) if teacher else None
    row = {"name": Path(model).name, **measured(model, splits.test, teacher_logits=teacher_logits, **own(model))}
    show([row], as_json, row)


@command
def benchmark(
    file: Annotated[Path, typer.Argument(help="A .tflite file.")],
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads; may be repeated. Default: 1 2")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Another .tflite, measured in turn with this one.")] = None,
    as_json: Json = False,
):
    """Time, memory and size of a .tflite on this machine's CPU, operator by operator, or of two files.

    Example: kdistill benchmark npu/student.tflite --baseline reference/student.tflite
    """
    from kdistill.tflite.benchmark import benchmark as measured
    from kdistill.tflite.benchmark import lines

    most = 4 * (os.cpu_count() or 1)
    for count in threads or ():
        if count > most or threads.count(count) > 1:
            raise InputError(
                f"--threads expects different numbers from 1 to {most}, four times the cores, received {count}."
            )
    result = measured(file, tuple(threads or (1, 2)), baseline)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show_lines(*lines(result))


@command
def inspect(
    file: Annotated[Path, typer.Argument(help="A .tflite file.")],
    against: Annotated[
        Path | None, typer.Option(help="The float32 file of the same model: shows which layers lose most.")
    ] = None,
    data: DataName = "mnist",
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    download: Download = False,
    as_json: Json = False,
):
    """The content of a .tflite: operators, precision by layer, what stayed float and why, metadata, oldest runtime.

    The data set is used with --against only: both files run on its test images.
    Example: kdistill inspect runs/mnist-default-1/npu/student.tflite
    """
    from kdistill.tflite.inspection import inspect as inspected
    from kdistill.tflite.inspection import lines

    images = None
    if against is not None:
        images = data_of(data, data_dir, download, say_to(as_json), image_size).test.images
    result = inspected(file, against, images)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show_lines(*lines(result))


@command
@takes_teacher
def export(
    model: Annotated[Path, typer.Argument(help="A .keras file.")],
    teacher: list[str],
    profile: Annotated[list[str] | None, typer.Option(help="A profile's name or .py file; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for <profile>/student.tflite.")] = Path("exports"),
    data: DataName = "mnist",
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    download: Download = False,
    max_drop: Annotated[float | None, number(0, 100, "Largest accuracy loss, in points.")] = None,
    min_agreement: Annotated[float | None, number(0, 100, "Lowest agreement, in %.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A file with the class names, one per line. Default: the data set's.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the file's metadata, such as Apache-2.0.")] = None,
    version: Annotated[str | None, typer.Option(help="Version of the model. Default: 1")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make a file that loses too much in other ways; --teacher trains it.")
    ] = False,
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
):
    """Convert a Keras model to .tflite files, each checked against the model on the test images.

    The files take raw pixels: --mean and --std become part of them, and replace those of the profiles. With --repair
    and --teacher, the last way is quantization-aware training on the training images.

    Example: kdistill export student.keras --profile npu --profile phone_cpu --out files
    """
    from kdistill.recipe.loading import load_profile

    names = profile or ["phone_cpu"]
    if len(set(names)) != len(names):
        raise InputError(f"--profile names {max(names, key=names.count)} twice. Give each profile once.")
    profiles = [load_profile(name) for name in names]
    if teacher and not repair:
        raise InputError("--teacher does nothing without --repair. Add --repair, or remove --teacher.")
    import_tensorflow()
    from kdistill.networks import saving

    say = say_to(as_json)
    splits = data_of(data, data_dir, download, say, image_size)
    from kdistill.conversion.export import export_profiles, input_warning, refused_row
    from kdistill.conversion.float32 import prepare
    from kdistill.conversion.graph import with_range
    from kdistill.conversion.verify import with_limits
    from kdistill.evaluation.evaluate import evaluate as measured
    from kdistill.report.markdown import refused_model

    shape, classes = splits.train.images.shape[1:], len(splits.class_names)
    student = prepare(saving.load_checked(str(model), shape, classes))
    names = splits.class_names if labels is None else _labels(labels)
    limits = [None if limit is None else limit / 100 for limit in (max_drop, min_agreement)]
    about = {"license": license, "version": version, "data": splits.fingerprint}
    profiles = [with_range(with_limits(target, *limits), mean or None, std or None) for target in profiles]
    texts = [input_warning(student, target, splits.test.images, splits.test.labels) for target in profiles]
    for text in dict.fromkeys(filter(None, texts)):
        say(f"Warning: {text}")
    options = {"class_names": names, "about": about}
    files, errors = export_profiles(student, out, profiles, splits.train.images, splits.test, **options)
    if repair and errors:
        files |= _repaired(student, out, profiles, splits, errors, teacher, say, options)
    refused = [refused_row(name, error) for name, error in errors.items()]
    rows = [{"name": name, **measured(file["path"], splits.test)} for name, file in files.items()]
    rows += [refused_model(row) for row in refused if row["check"]]
    if rows:
        show(rows, as_json, [*files.values(), *({"profile": row["name"], "refused": row} for row in refused)])
    if errors:
        # A profile that does not suit the model is bad input, a file that is not good enough a failed check.
        kind = next((type(error) for error in errors.values() if isinstance(error, InputError)), CheckFailed)
        raise kind("\n".join(str(error) for error in errors.values()))


def _repaired(student, out: Path, profiles, splits, errors: dict, teacher: list[str], say, options: dict) -> dict:
    """The files that a repair has made; what it cannot repair stays in `errors`."""
    from kdistill.repairs.ladder import repair_profiles
    from kdistill.teachers.as_model import load_teacher

    def retraining(profile):
        if not teacher:
            return None
        from kdistill.repairs.retraining import with_teacher  # imports tf_keras, for those who train

        shape, classes = splits.train.images.shape[1:], len(splits.class_names)
        return with_teacher(load_teacher(network_of(teacher), shape, classes, say).model, splits, None, profile, say)

    refused = [profile for profile in profiles if profile.name in errors]
    data = splits.train.images, splits.test
    return repair_profiles(student, out, refused, *data, errors, retraining, say=say, **options)


def _labels(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"'{path}' is no text in UTF-8; --labels expects one name a line.") from None


@command
@takes_teacher
def compress(
    model: Annotated[Path, typer.Argument(help="A .keras file.")],
    scheme: Annotated[
        str, typer.Option(help="prune, prune_2_4, cluster, prune_cluster, qat, pqat, cqat, pcqat, int8.")
    ],
    teacher: list[str],
    out: Annotated[Path, typer.Option(help="Folder for the model, the .tflite and the table.")] = Path("compressed"),
    data: DataName = "mnist",
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    download: Download = False,
    epochs: Annotated[int, number(1, MOST["epochs"], "Of fine-tuning, in each step of the scheme.")] = Stage.epochs,
    learning_rate: Annotated[
        float, number(0, MOST_OF_REALS["learning_rate"], "Of Adam, from which a cosine leads to zero.")
    ] = Stage.learning_rate,
    batch_size: Annotated[int, number(1, MOST["batch_size"], "Images in a batch.")] = Stage.batch_size,
    shift: Annotated[int, number(0, MOST["shift"], "Shift training images by up to so many pixels.")] = 0,
    weight: Annotated[
        float | None, number(0, 1, f"The teacher's share of the loss. Default: {DISTILLATION_WEIGHT}")
    ] = None,
    temperature: Annotated[
        float | None, number(0, LARGEST, f"The teacher's temperature. Default: {TEMPERATURE:g}")
    ] = None,
    sparsity: Annotated[float | None, number(0, 1, "Share of zeros after pruning. Default: 0.8")] = None,
    clusters: Annotated[int | None, number(3, 256, "Values of each clustered kernel. Default: 16")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A layer to skip; may be repeated.")] = None,
    layer_sparsity: Annotated[list[str] | None, typer.Option(help="LAYER=SHARE; may be repeated.")] = None,
    layer_clusters: Annotated[list[str] | None, typer.Option(help="LAYER=NUMBER; may be repeated.")] = None,
    seed: Annotated[int, number(0, MOST["seed"], "Of order, augmentation and clusters.")] = 0,
    cache: Annotated[
        str, typer.Option(help="The teacher's stored outputs: auto where they pay, a folder, or off.")
    ] = "auto",
    mean: Mean = None,
    std: Std = None,
    as_json: Json = False,
):
    """Prune, cluster or quantize a Keras model while its teacher still teaches; writes model, .tflite and table.

    After an interruption, the same command resumes behind the last finished step. --mean and --std are for model and
    teacher; the new model and its file take raw pixels.

    Example: kdistill compress student.keras --scheme pcqat --teacher teacher.keras --out small
    """
    stage = Stage(
        scheme,
        epochs,
        batch_size,
        learning_rate,
        final_sparsity=sparsity,
        clusters=clusters,
        layer_sparsity=_by_layer(layer_sparsity, "--layer-sparsity", float),
        layer_clusters=_by_layer(layer_clusters, "--layer-clusters", int),
        skip=tuple(skip or ()),
    )
    check_stage(stage, "stage")
    objective = {"distillation_weight": weight, "temperature": temperature}
    objective = {name: value for name, value in objective.items() if value is not None}
    if objective and not teacher:
        option = "--weight" if "distillation_weight" in objective else "--temperature"
        raise InputError(f"{option} does nothing without a teacher. Add --teacher, or remove {option}.")
    if cache not in ("auto", "off") and not teacher:
        raise InputError("--cache does nothing without a teacher. Add --teacher, or remove --cache.")
    if teacher and not SCHEMES[scheme]:
        raise InputError(f"--teacher does nothing with the scheme '{scheme}', which trains nothing. Remove it.")
    import_tensorflow()
    from kdistill.networks import saving
    from kdistill.report.markdown import layer_table
    from kdistill.runs import compressions
    from kdistill.teachers.as_model import load_teacher

    say = say_to(as_json)
    splits = data_of(data, data_dir, download, say, image_size)
    shape, classes = splits.train.images.shape[1:], len(splits.class_names)
    student = saving.load_checked(str(model), shape, classes)
    teacher_model = load_teacher(network_of(teacher), shape, classes, say).model if teacher else None
    options = {**objective, "augment": Data(shift=shift), "seed": seed, "say": say}
    options |= {"mean": mean or None, "std": std or None}
    options |= {"cache": cache} if teacher else {}
    report = compressions.to_folder(student, stage, teacher_model, splits, out, **options)
    if not as_json:
        show_table(*layer_table(report["layers"]))
        show_lines(*report["notes"])
    show(report["models"], as_json, report)
    fail_if_refused([report["refused"]] if report["refused"] else [], out / "compression.json")


def _by_layer(settings: list[str] | None, option: str, kind: type) -> dict:
    """`["conv1=0.5"]` -> `{"conv1": 0.5}`."""
    numbers = {}
    for setting in settings or []:
        layer, _, number = setting.rpartition("=")
        try:
            numbers[layer] = kind(number)
        except ValueError:
            layer = ""
        if not layer:
            raise InputError(f"{option} expects LAYER={kind.__name__.upper()}, received '{setting}'.")
    return numbers
