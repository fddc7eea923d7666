"""The content of any `.tflite`: operators, precision by layer, what stayed float, metadata.

The file is opened in a process of its own, without TensorFlow (`python -m kdistill.tflite.inspection FILE`): a damaged
file may stop it.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from kdistill.errors import InputError
from kdistill.files import byte_sizes
from kdistill.tflite import flatbuffer, metadata, microcontroller, quantization_error
from kdistill.tflite.interpreter import (
    REFUSED,
    check_header,
    open_interpreter,
    run_isolated,
    signature_names,
    signatures,
    tensor_details,
)
from kdistill.tflite.quantization_error import short_name

SECONDS = 300


def inspect(path: str | Path, against: str | Path | None = None, images: np.ndarray | None = None) -> dict:
    """Describes a `.tflite` file of any origin.

    Args:
        path: The file.
        against: The float32 file of the same model, to measure what quantization costs in each layer.
        images: Raw pixels `[n, height, width, channels]`, needed with `against`.

    Returns:
        A dict: file, bytes, bytes_deflated, sha256, min_runtime, signatures, inputs, outputs, quantization, operators
        (name -> count), layers (dicts of name, tensor, weights, result), float_layers, missing_in_micro, metadata; with
        `against` also cost, see `quantization_error.compare`.

    Raises:
        InputError: A file is absent, damaged, or of another format.
    """
    for file in (path, against):
        if file is not None:
            check_header(Path(file))
    report = json.loads(run_isolated("inspection", Path(path), SECONDS))
    if against is not None:
        report["cost"] = quantization_error.compare(path, against, images)
    return report


def lines(report: dict) -> list[str]:
    """The report of `inspect` as text."""
    text = [
        f"{report['file']}: {report['bytes']:,} bytes, {report['bytes_deflated']:,} deflated",
        f"sha256 {report['sha256']}",
        f"Oldest runtime: {report['min_runtime'] or 'unknown'}. Precision: {_PRECISION[report['quantization']]}.",
        *(f"Input  {_end(end)}" for end in report["inputs"]),
        *(f"Output {_end(end)}" for end in report["outputs"]),
        "Operators: " + ", ".join(f"{count} {name}" for name, count in report["operators"].items()),
        "",
        f"{'operator':<24}{'weights':<10}{'result':<10}layer",
    ]
    for layer in report["layers"]:
        name = short_name(layer["tensor"])
        text.append(f"{layer['name']:<24}{layer['weights'] or '-':<10}{layer['result']:<10}{name}")
    text += ["", *_float_lines(report)]
    if report["missing_in_micro"]:
        text.append(f"TensorFlow Lite Micro has no {', '.join(report['missing_in_micro'])}.")
    text += _metadata_lines(report["metadata"]) if report["metadata"] else ["Metadata: none."]
    if "cost" in report:
        text += ["", f"{'dB':>5} {'noise added':>12}  the layers in which quantization costs most"]
        for row in report["cost"][:10]:
            share, name = f"{row['cost']:.2%}", short_name(row["tensor"])
            text.append(f"{row['sqnr']:>5.0f} {share:>12}  {row['operator']} '{name}'")
    return text


def _float_lines(report: dict) -> list[str]:
    rows = report["float_layers"]
    if not rows:
        return [] if report["quantization"] == "none" else ["Stayed float: nothing."]
    return ["Stayed float:"] + [
        f"  {row['operator']} '{row.get('layer') or 'unnamed'}': {row['reason']}" for row in rows
    ]


def _metadata_lines(entry: dict) -> list[str]:
    values = [f"{key} {entry[key]}" for key in ("name", "version", "author", "license") if entry.get(key)]
    text = [f"Metadata: {'; '.join(values)}"]
    for image in entry["inputs"]:
        if not image["colors"] and not image["mean"]:
            text.append(f"  input '{image['name']}': {image['description'] or 'not described'}")
            continue
        numbers = f"(pixel - {image['mean']}) / {image['std']}" if image["mean"] else "not stated"
        text.append(f"  input '{image['name']}': colors {image['colors'] or 'not stated'}; normalization {numbers}")
    for output in (entry.get("document") or {}).get("outputs") or []:
        if isinstance(output, dict) and output.get("head"):
            text.append(f"  output '{output.get('name')}': {output.get('values')}")
    if entry["labels"]:
        some = ", ".join(entry["labels"][:10]) + (", ..." if len(entry["labels"]) > 10 else "")
        text.append(f"  {len(entry['labels'])} labels: {some}")
    origin = (entry.get("document") or {}).get("provenance") or {}
    for key in ("weights_sha256", "data", "metrics"):
        if origin.get(key):
            text.append(f"  {key}: {origin[key]}")
    if origin.get("recipe"):
        text.append(f"  recipe: {origin['recipe'].get('name')} (all of it with --json)")
    return text


_PRECISION = {
    "none": "float32",
    "float16": "float16 weights, computed in float",
    "dynamic": "int8 weights, float activations",
    "int8": "int8 weights and activations",
    "int4": "int4 weights, float activations",
}


def _end(end: dict) -> str:
    shape = ", ".join("any" if size is None else str(size) for size in end["shape"])
    scale = f", scale {end['scale']:.6g}, zero point {end['zero_point']}" if end["scale"] else ""
    return f"'{end['name']}': {end['type']} [{shape}]{scale}"


def _quantization(layers: list[dict]) -> str:
    """The `quantization` of a profile that gives such layers."""
    weights = Counter(layer["weights"] for layer in layers)
    if any(layer["result"] in ("int8", "int16") for layer in layers if layer["name"] != "QUANTIZE"):
        return "int8"
    for kind, name in (("int4", "int4"), ("int8", "dynamic"), ("float16", "float16")):
        if weights[kind]:
            return name
    return "none"


def _inspect(path: Path) -> dict:
    content = path.read_bytes()
    interpreter = open_interpreter(path)
    names = signature_names(interpreter)
    model = flatbuffer.parse(content)
    layers = flatbuffer.operators(model)
    quantization = _quantization(layers)
    entry = metadata.of_file(path)
    document = (entry or {}).get("document") or {}
    if "float_layers" in document:
        float_layers = document["float_layers"]
    else:
        float_layers = [
            {"operator": row["operator"], "layer": short_name(row["tensor"]), "reason": row["reason"]}
            for row in flatbuffer.stayed_float(model, quantization)
        ]
    counts = Counter(layer["name"] for layer in layers)
    return {
        "file": str(path),
        "bytes": len(content),
        "bytes_deflated": byte_sizes(content)["deflated"],
        "sha256": hashlib.sha256(content).hexdigest(),
        "min_runtime": flatbuffer.min_runtime(model),
        "signatures": sorted(signatures(interpreter)),
        "inputs": [tensor_details(details, names) for details in interpreter.get_input_details()],
        "outputs": [tensor_details(details, names) for details in interpreter.get_output_details()],
        "quantization": quantization,
        "operators": dict(counts.most_common()),
        "layers": layers,
        "float_layers": float_layers,
        "missing_in_micro": sorted(counts.keys() - microcontroller.OPERATORS.keys()),
        "metadata": entry,
    }


def _main(path: str) -> None:
    try:
        print(json.dumps(_inspect(Path(path))))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
