"""The cost of running a `.tflite` on this machine: time, memory, size; alone, or side by side with another file.

All is measured in a process of its own, without TensorFlow (`python -m kdistill.tflite.benchmark FILE OPTIONS`), so
that the memory is that of the file.
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
from kdistill.tflite.interpreter import (
    REFUSED,
    File,
    call_times,
    noise_for,
    open_interpreter,
    operator_details,
    quantize,
    quiet,
    run_isolated,
)

SECONDS = 1800
WARMUP, RUNS, REPEATS = 20, 200, 3
ROUNDS, BLOCK = 40, 10  # of two files side by side
OPERATOR_RUNS = 30


def benchmark(path: str | Path, threads: tuple[int, ...] = (1, 2), baseline: str | Path | None = None) -> dict:
    """Measures time, memory and size of a `.tflite` file on the CPU of this machine.

    Args:
        path: The file.
        threads: Numbers of CPU threads to measure with.
        baseline: Another file; the two run in turns on one thread.

    Returns:
        A dict with these keys.
        file, bytes, bytes_deflated
        load_ms: to open the file and allocate its tensors, with the interpreter already imported.
        peak_memory: bytes by which the resident memory grows while the file is loaded and runs once, accurate to about
            1 MB.
        latency: a dict per number of threads: threads, median_us, p90_us.
        accelerated: whether LiteRT's CPU accelerator takes every operator; None where that cannot be determined.
        operators, operators_us: dicts of operator, count, microseconds and share, and the sum of their times. Each
            operator runs alone on one thread, with its true input. The sum exceeds the time of the whole file where
            LiteRT fuses operators or finds their inputs in the cache.
        not_timed: the operators that cannot run alone.
        ratio: with `baseline`, its time divided by the time of this file: median, low and high (10th and 90th
            percentile of the rounds). Above 1, this file is faster.

    Raises:
        InputError: A file cannot run.
    """
    options = json.dumps({"threads": list(threads), "baseline": None if baseline is None else str(baseline)})
    for file in (path, baseline):
        if file is not None:
            File(file)  # the trial run: its message tells what is damaged
    return json.loads(run_isolated("benchmark", Path(path), SECONDS, options))


def lines(report: dict) -> list[str]:
    """The report of `benchmark` as text."""
    text = [f"{report['file']}: {report['bytes']:,} bytes, {report['bytes_deflated']:,} deflated"]
    for row in report["latency"]:
        text.append(f"  {row['threads']} thread(s): median {row['median_us']:.0f} µs, p90 {row['p90_us']:.0f} µs")
    text.append(f"  load {report['load_ms']:.1f} ms, peak memory {report['peak_memory'] / 1e6:.1f} MB")
    text.append(f"  {_ACCELERATED[report['accelerated']]}")
    if report["operators"]:
        text.append(f"  by operator, timed alone on 1 thread (sum {report['operators_us']:.0f} µs):")
    for row in report["operators"]:
        text.append(f"    {row['operator']:<24}{row['count']:>4} {row['microseconds']:>9.1f} µs {row['share']:>7.1%}")
    if report["not_timed"]:
        text.append(f"    not timed: {', '.join(report['not_timed'])}")
    if report.get("ratio"):
        ratio = report["ratio"]
        text.append(
            f"  {ratio['baseline']} takes {ratio['median']:.2f} times as long ({ratio['low']:.2f} to "
            f"{ratio['high']:.2f}, 10th to 90th percentile of {ROUNDS} rounds in turns): "
            f"{ratio['baseline_us']:.0f} µs against {ratio['this_us']:.0f} µs"
        )
    return text


_ACCELERATED = {
    True: "every operator is accelerated on this CPU",
    False: "not every operator is accelerated on this CPU",
    None: "LiteRT cannot tell here whether every operator is accelerated",
}


def _measure(path: Path, threads: list[int], baseline: str | None) -> dict:
    File(path, trusted=True).interpreter_on_noise()  # loads libraries, fills pools: the rest is the file's memory
    content = path.read_bytes()
    _reset_peak()
    before = _memory("VmRSS")
    start = time.perf_counter()
    interpreter = open_interpreter(path)
    load = time.perf_counter() - start
    file = File(path, trusted=True)
    interpreter = file.interpreter_on_noise()
    interpreter.invoke()
    peak = max(_memory("VmHWM") - before, 0)
    report = {
        "file": str(path),
        "bytes": len(content),
        "bytes_deflated": byte_sizes(content)["deflated"],
        "load_ms": 1000 * load,
        "peak_memory": peak,
        "latency": [{"threads": n, **file.latency(n, WARMUP, RUNS, REPEATS)} for n in threads],
        "accelerated": _accelerated(path),
    }
    operators, not_timed = _by_operator(path)
    total = sum(row["microseconds"] for row in operators)
    for row in operators:
        row["share"] = row["microseconds"] / total if total else 0.0
    report |= {"operators": operators, "operators_us": total, "not_timed": not_timed}
    if baseline:
        report["ratio"] = {"baseline": baseline, **_side_by_side(file, File(baseline, trusted=True))}
    return report


def _side_by_side(this: File, other: File) -> dict:
    pair = [file.interpreter_on_noise() for file in (this, other)]
    images = [file.batch or 1 for file in (this, other)]
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
    except Exception:  # CompiledModel does not run on every machine, and raises errors of its own kinds
        return None


def _by_operator(path: Path) -> tuple[list[dict], list[str]]:
    """The time of every kind of operator, the slowest first; and the kinds that cannot run alone."""
    model = flatbuffer.read(path)
    if len(model.subgraphs) != 1:
        return [], ["files with several subgraphs"]
    graph = model.subgraphs[0]
    whole = open_interpreter(path, delegates=False, keep_tensors=True)
    _run_on_noise(whole)
    makers = {operator.outputs[0]: operator for operator, _ in flatbuffer.named_operators(model, graph)}
    stored = flatbuffer.dequantized_constants(model, graph)
    times, counts, failed = defaultdict(float), defaultdict(int), {}
    for operator, name in flatbuffer.named_operators(model, graph):
        if operator.outputs[0] in stored:
            continue  # the interpreter unpacks these weights once, when it loads the file
        before = [makers[i] for i in operator.inputs if i in stored]
        inputs = [
            i
            for i in operator.inputs
            if i >= 0 and i not in stored and not flatbuffer.is_constant(model, graph.tensors[i])
        ]
        try:
            alone = _interpreter_of(model, graph, [*before, operator], inputs, whole)
            for details, i in zip(alone.get_input_details(), dict.fromkeys(inputs), strict=True):
                alone.set_tensor(details["index"], whole.get_tensor(i))
            call_times(alone, 5)
            times[name] += float(np.median(call_times(alone, OPERATOR_RUNS)))
            counts[name] += 1
        except (ValueError, RuntimeError, InputError):
            failed[name] = None
    rows = [{"operator": name, "count": counts[name], "microseconds": times[name]} for name in times]
    return sorted(rows, key=lambda row: -row["microseconds"]), list(failed)


def _run_on_noise(interpreter) -> None:
    for details in interpreter.get_input_details():
        scale, zero_point = details["quantization"]
        shape = [int(size) for size in details["shape"]]
        end = {"type": np.dtype(details["dtype"]).name, "scale": scale, "zero_point": zero_point, "shape": shape}
        interpreter.set_tensor(details["index"], quantize(noise_for(end, shape[0]), end))
    interpreter.invoke()


def _interpreter_of(model: schema.ModelT, graph: schema.SubGraphT, operators: list, inputs: list[int], whole):
    """An interpreter of these operators alone, the last of which gives the output.

    The shapes are those of the interpreter `whole`, which has run.
    """
    part, part_graph = schema.ModelT(), schema.SubGraphT()
    part.version, part.operatorCodes, part.buffers = model.version, model.operatorCodes, [schema.BufferT()]
    computed = {int(i) for operator in operator_details(whole) for i in operator["outputs"]} | set(inputs)
    index, part_graph.tensors, part_graph.operators = {-1: -1}, [], []
    for operator in operators:
        for i in (*operator.inputs, *operator.outputs):
            if i in index:
                continue
            old, tensor = graph.tensors[i], schema.TensorT()
            tensor.shape = list(whole.get_tensor(i).shape) if i in computed else old.shape
            tensor.type, tensor.name, tensor.quantization = old.type, old.name, old.quantization
            if flatbuffer.is_constant(model, old):
                part.buffers.append(model.buffers[old.buffer])
                tensor.buffer = len(part.buffers) - 1
            index[i] = len(part_graph.tensors)
            part_graph.tensors.append(tensor)
        step = schema.OperatorT()
        for key, value in vars(operator).items():
            setattr(step, key, value)
        step.inputs, step.outputs = ([index[i] for i in ends] for ends in (operator.inputs, operator.outputs))
        part_graph.operators.append(step)
    part_graph.inputs = [index[i] for i in dict.fromkeys(inputs)]
    part_graph.outputs = [index[i] for i in operators[-1].outputs]
    part.subgraphs = [part_graph]
    return open_interpreter(flatbuffer.pack(part))


def _reset_peak() -> None:
    """Resets the peak of this process's resident memory (Linux only)."""
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
        print(json.dumps(_measure(Path(path), **json.loads(options))))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
