"""What running a `.tflite` costs on this machine: time, memory, size; and two files side by side. No TensorFlow.

Everything is measured in a process of its own (`python -m kdistill.benchmark FILE`), so that memory is the file's.
"""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kdistill.errors import InputError
from kdistill.files import byte_sizes
from kdistill.tflite import flatbuffer
from kdistill.tflite.interpreter import REFUSED, File, call_times, quantized, quiet, run_apart

SECONDS = 1800
WARMUP, RUNS, REPEATS = 20, 200, 3
ROUNDS, BLOCK = 40, 10  # of two files side by side
OPERATOR_RUNS = 30


def benchmark(path: str | Path, threads: tuple[int, ...] = (1, 2), baseline: str | Path | None = None) -> dict:
    """A dict: file, bytes, bytes_deflated, load_ms, peak_memory (bytes), latency (one dict per number of threads:
    threads, median_us, p90_us), accelerated (whether LiteRT's CPU accelerator takes every operator), operators
    (dicts of operator, count, microseconds, share) and operators_us, their sum.

    `load_ms` is opening and allocating, the interpreter imported already; `peak_memory` is the growth of the resident
    memory while loading and running once, good to about 1 MB. The operators are timed one by one, each as a file of its
    own with its true input, on one thread: the sum is above the whole where LiteRT fuses or keeps things in the cache.
    With `baseline` also ratio: of its time to this file's, the two run by turns on one thread: median, low and high
    (10th and 90th percentile over the rounds); above 1 this file is faster.
    Raises `InputError` for a file that cannot be run.
    """
    options = json.dumps({"threads": list(threads), "baseline": None if baseline is None else str(baseline)})
    File(path)  # refuses what is damaged with a message that tells it
    if baseline is not None:
        File(baseline)
    return json.loads(run_apart("benchmark", Path(path), SECONDS, options))


def lines(found: dict) -> list[str]:
    """The same for a reader."""
    text = [f"{found['file']}: {found['bytes']:,} bytes, {found['bytes_deflated']:,} deflated"]
    for each in found["latency"]:
        text.append(f"  {each['threads']} thread(s): median {each['median_us']:.0f} µs, p90 {each['p90_us']:.0f} µs")
    text.append(f"  load {found['load_ms']:.1f} ms, peak memory {found['peak_memory'] / 1e6:.1f} MB")
    all_ = {True: "every operator is", False: "not every operator is", None: "cannot be told whether all operators are"}
    text.append(f"  {all_[found['accelerated']]} accelerated on this CPU")
    if found["operators"]:
        text.append(f"  by operator, each run alone on 1 thread (sum {found['operators_us']:.0f} µs):")
    for each in found["operators"]:
        text.append(
            f"    {each['operator']:<24}{each['count']:>4} {each['microseconds']:>9.1f} µs {each['share']:>7.1%}"
        )
    if found["not_timed"]:
        text.append(f"    not timed: {', '.join(found['not_timed'])}")
    if found.get("ratio"):
        ratio = found["ratio"]
        text.append(
            f"  {ratio['baseline']} takes {ratio['median']:.2f} times as long ({ratio['low']:.2f} to "
            f"{ratio['high']:.2f}, 10th to 90th percentile of {ROUNDS} rounds by turns): "
            f"{ratio['baseline_us']:.0f} against {ratio['this_us']:.0f} µs"
        )
    return text


def _measured(path: Path, threads: list[int], baseline: str | None) -> dict:
    from ai_edge_litert.interpreter import Interpreter  # before the clock and the memory are looked at

    File(path, tried=True).filled()  # libraries are loaded, pools made: what remains is the file's
    content = path.read_bytes()
    _reset_peak()
    before = _memory("VmRSS")
    start = time.perf_counter()
    with quiet():
        interpreter = Interpreter(model_path=str(path))
        interpreter.allocate_tensors()
    load = time.perf_counter() - start
    file = File(path, tried=True)
    interpreter = file.filled()
    interpreter.invoke()
    peak = max(_memory("VmHWM") - before, 0)
    found = {
        "file": str(path),
        "bytes": len(content),
        "bytes_deflated": byte_sizes(content)["deflated"],
        "load_ms": 1000 * load,
        "peak_memory": peak,
        "latency": [{"threads": n, **file.latency(n, WARMUP, RUNS, REPEATS)} for n in threads],
        "accelerated": _accelerated(path),
    }
    operators, not_timed = _by_operator(path)
    total = sum(each["microseconds"] for each in operators)
    for each in operators:
        each["share"] = each["microseconds"] / total if total else 0.0
    found |= {"operators": operators, "operators_us": total, "not_timed": not_timed}
    if baseline:
        found["ratio"] = {"baseline": baseline, **_side_by_side(file, File(baseline, tried=True))}
    return found


def _side_by_side(this: File, other: File) -> dict:
    pair = [each.filled() for each in (this, other)]
    images = [each.batch or 1 for each in (this, other)]
    for interpreter in pair:
        for _ in range(WARMUP):
            interpreter.invoke()
    rounds = np.empty((ROUNDS, 2))
    for i in range(ROUNDS):
        for j in (0, 1) if i % 2 else (1, 0):
            rounds[i, j] = np.median(call_times(pair[j], BLOCK)) / images[j]
    ratio = rounds[:, 1] / rounds[:, 0]
    low, middle, high = np.percentile(ratio, [10, 50, 90])
    this_us, other_us = np.median(rounds, axis=0)
    return {"median": middle, "low": low, "high": high, "this_us": this_us, "baseline_us": other_us}


def _accelerated(path: Path) -> bool | None:
    try:
        from ai_edge_litert.compiled_model import CompiledModel

        with quiet():
            model = CompiledModel.from_file(str(path))
            return bool(model.is_fully_accelerated())
    except Exception:  # a machine without what CompiledModel wants; its kinds of errors are its own
        return None


def _by_operator(path: Path) -> tuple[list[dict], list[str]]:
    """Time by kind of operator, the slowest first; and the kinds that cannot be run alone."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    model = flatbuffer.read(path)
    if len(model.subgraphs) != 1:
        return [], ["files with several subgraphs"]
    graph = model.subgraphs[0]
    with quiet():
        whole = Interpreter(
            str(path),
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
        whole.allocate_tensors()
    taken = whole.get_input_details()[0]
    noise = np.random.default_rng(0).integers(0, 256, taken["shape"])
    end = {
        "type": np.dtype(taken["dtype"]).name,
        "scale": taken["quantization"][0],
        "zero_point": taken["quantization"][1],
    }
    whole.set_tensor(taken["index"], quantized(noise, end))
    whole.invoke()
    makers = {operator.outputs[0]: operator for operator, _ in flatbuffer.steps(model, graph)}
    stored = {
        out for out, op in makers.items() if _constant(model, graph, op.inputs[0]) and _is(model, op, "DEQUANTIZE")
    }
    times, counts, failed = defaultdict(float), defaultdict(int), {}
    for operator, name in flatbuffer.steps(model, graph):
        if operator.outputs[0] in stored:
            continue  # weights kept small; unpacked once, when the file is loaded
        before = [makers[i] for i in operator.inputs if i in stored]
        inputs = [i for i in operator.inputs if i >= 0 and i not in stored and not _constant(model, graph, i)]
        try:
            with quiet():
                alone = Interpreter(model_content=_alone(model, graph, [*before, operator], inputs, whole))
                alone.allocate_tensors()
            for place, i in zip(alone.get_input_details(), dict.fromkeys(inputs), strict=True):
                alone.set_tensor(place["index"], whole.get_tensor(i))
            call_times(alone, 5)
            times[name] += float(np.median(call_times(alone, OPERATOR_RUNS)))
            counts[name] += 1
        except (ValueError, RuntimeError):
            failed[name] = None
    rows = [{"operator": name, "count": counts[name], "microseconds": times[name]} for name in times]
    return sorted(rows, key=lambda row: -row["microseconds"]), list(failed)


def _is(model: schema.ModelT, operator: schema.OperatorT, name: str) -> bool:
    code = model.operatorCodes[operator.opcodeIndex]
    return max(code.builtinCode, code.deprecatedBuiltinCode) == getattr(schema.BuiltinOperator, name)


def _constant(model: schema.ModelT, graph: schema.SubGraphT, index: int) -> bool:
    return index >= 0 and model.buffers[graph.tensors[index].buffer].data is not None


def _alone(model: schema.ModelT, graph: schema.SubGraphT, operators: list, inputs: list[int], whole) -> bytes:
    """The bytes of a file with these operators alone, the last of which gives the output."""
    made, part = schema.ModelT(), schema.SubGraphT()
    made.version, made.operatorCodes, made.buffers = model.version, model.operatorCodes, [schema.BufferT()]
    place, part.tensors, part.operators = {-1: -1}, [], []
    for operator in operators:
        for i in (*operator.inputs, *operator.outputs):
            if i in place:
                continue
            old, tensor = graph.tensors[i], schema.TensorT()
            tensor.shape = list(whole.get_tensor(i).shape) if i in _computed(whole) or i in inputs else old.shape
            tensor.type, tensor.name, tensor.quantization = old.type, old.name, old.quantization
            if _constant(model, graph, i):
                made.buffers.append(model.buffers[old.buffer])
                tensor.buffer = len(made.buffers) - 1
            place[i] = len(part.tensors)
            part.tensors.append(tensor)
        step = schema.OperatorT()
        for key, value in vars(operator).items():
            setattr(step, key, value)
        step.inputs, step.outputs = ([place[i] for i in ends] for ends in (operator.inputs, operator.outputs))
        part.operators.append(step)
    part.inputs = [place[i] for i in dict.fromkeys(inputs)]
    part.outputs = [place[i] for i in operators[-1].outputs]
    made.subgraphs = [part]
    return flatbuffer.packed(made)


def _computed(whole) -> set[int]:
    """The tensors that an interpreter's operators compute."""
    return {int(i) for operator in whole._get_ops_details() for i in operator["outputs"]}


def _reset_peak() -> None:
    """The peak of memory starts anew (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _memory(key: str) -> int:
    """Resident memory of this process in bytes, now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return 1024 * int(line.split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _main(path: str, options: str) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        print(json.dumps(_measured(Path(path), **json.loads(options))))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
