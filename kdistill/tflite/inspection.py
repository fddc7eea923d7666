"""What a `.tflite` file is, whoever made it: operators, precision by layer, what stayed float, metadata. No TensorFlow.

The file is opened in a process of its own (`python -m kdistill.inspection FILE`), as a damaged one may stop it.
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
from kdistill.tflite.interpreter import REFUSED, checked_head, details, quiet, run_apart

SECONDS = 300


def inspect(path: str | Path, against: str | Path | None = None, images: np.ndarray | None = None) -> dict:
    """A dict: file, bytes, bytes_deflated, sha256, min_runtime, signatures, inputs, outputs, quantization, operators
    (name -> count), layers (operator, tensor, weights, result), float_layers, missing_in_micro and metadata.

    With `against`, the float32 file of the same model, and raw pixels `images` also cost: see `layerwise.compare`.
    Raises `InputError` for a file that is absent, damaged, or of another kind.
    """
    checked_head(Path(path))
    found = json.loads(run_apart("inspection", Path(path), SECONDS))
    if against is not None:
        checked_head(Path(against))
        found["cost"] = quantization_error.compare(path, against, images)
    return found


def lines(found: dict) -> list[str]:
    """The same for a reader."""
    told = found["metadata"] or {}
    origin = (told.get("document") or {}).get("provenance") or {}
    text = [
        f"{found['file']}: {found['bytes']:,} bytes, {found['bytes_deflated']:,} deflated",
        f"sha256 {found['sha256']}",
        f"Needs a runtime from {found['min_runtime'] or 'unknown'} on. Precision: {_PRECISION[found['quantization']]}.",
        *(f"Input  {_end(each)}" for each in found["inputs"]),
        *(f"Output {_end(each)}" for each in found["outputs"]),
        "Operators: " + ", ".join(f"{count} {name}" for name, count in found["operators"].items()),
        "",
        f"{'operator':<24}{'weights':<10}{'result':<10}layer",
    ]
    for layer in found["layers"]:
        name = quantization_error.short(layer["tensor"])
        text.append(f"{layer['name']:<24}{layer['weights'] or '-':<10}{layer['result']:<10}{name}")
    text.append("")
    if found["float_layers"]:
        text.append("Stayed float:")
        for each in found["float_layers"]:
            text.append(f"  {each['operator']} '{each.get('layer') or 'unnamed'}': {each['reason']}")
    elif found["quantization"] != "none":
        text.append("Stayed float: nothing.")
    if found["missing_in_micro"]:
        text.append(f"TensorFlow Lite Micro has no {', '.join(found['missing_in_micro'])}.")
    if not told:
        text.append("Metadata: none.")
    else:
        named = [f"{key} {told[key]}" for key in ("name", "version", "author", "license") if told.get(key)]
        text.append(f"Metadata: {'; '.join(named)}")
        for each in told["inputs"]:
            numbers = f"(pixel - {each['mean']}) / {each['deviation']}" if each["mean"] else "not told"
            text.append(f"  input '{each['name']}': {each['colors'] or 'colors not told'}; normalization {numbers}")
        if told["labels"]:
            shown = ", ".join(told["labels"][:10]) + (", ..." if len(told["labels"]) > 10 else "")
            text.append(f"  {len(told['labels'])} labels: {shown}")
        for key in ("weights_sha256", "data", "metrics"):
            if origin.get(key):
                text.append(f"  {key}: {origin[key]}")
        if origin.get("recipe"):
            text.append(f"  recipe: {origin['recipe'].get('name')} (whole in --json)")
    if "cost" in found:
        text += ["", f"{'dB':>5} {'noise added':>12}  the layers that quantization costs most in"]
        for each in found["cost"][:10]:
            share = f"{each['cost']:.2%}"
            text.append(
                f"{each['sqnr']:>5.0f} {share:>12}  {each['operator']} '{quantization_error.short(each['tensor'])}'"
            )
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
    """Which of kdistill's kinds a file is, by what it holds."""
    weights = Counter(each["weights"] for each in layers)
    if any(each["result"] in ("int8", "int16") for each in layers if each["name"] != "QUANTIZE"):
        return "int8"
    for kind, name in (("int4", "int4"), ("int8", "dynamic"), ("float16", "float16")):
        if weights[kind]:
            return name
    return "none"


def _inspected(path: Path) -> dict:
    from ai_edge_litert.interpreter import Interpreter

    content = path.read_bytes()
    try:
        with quiet():
            interpreter = Interpreter(model_content=content)
            interpreter.allocate_tensors()
        ends = interpreter.get_input_details(), interpreter.get_output_details()
        signatures = interpreter._get_full_signature_list()
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise InputError(f"'{path}' cannot be opened: it is damaged, or of another version ({reason}).") from None
    first = next(iter(signatures.values()), {"inputs": {}, "outputs": {}})
    names = {index: name for ends_ in first.values() for name, index in ends_.items()}
    model = flatbuffer.parsed(content)
    layers = flatbuffer.operators(model)
    told = metadata.of_file(path)
    document = (told or {}).get("document") or {}
    kind = _quantization(layers)
    if "float_layers" in document:
        kept = document["float_layers"]
    else:
        kept = [
            {"operator": each["operator"], "layer": quantization_error.short(each["tensor"]), "reason": each["reason"]}
            for each in flatbuffer.stayed_float(model, kind)
        ]
    counts = Counter(each["name"] for each in layers)
    return {
        "file": str(path),
        "bytes": len(content),
        "bytes_deflated": byte_sizes(content)["deflated"],
        "sha256": hashlib.sha256(content).hexdigest(),
        "min_runtime": flatbuffer.min_runtime(model),
        "signatures": sorted(signatures),
        "inputs": [details(each, names) for each in ends[0]],
        "outputs": [details(each, names) for each in ends[1]],
        "quantization": kind,
        "operators": dict(counts.most_common()),
        "layers": layers,
        "float_layers": kept,
        "missing_in_micro": sorted(counts.keys() - microcontroller.OPERATORS.keys()),
        "metadata": told,
    }


def _main(path: str) -> None:
    try:
        print(json.dumps(_inspected(Path(path))))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
