"""What the models of a run give for examples, and what each example scores: by the meaning of the labels.

Where every example has one class, outputs are logits and a score is right or wrong. Of other labels, outputs are a dict
by name, and a score is the main metric of the first output (`head_metrics.MAIN_METRIC`), which the verdict tests.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from kdistill.data.splits import Examples, Splits
from kdistill.errors import InputError
from kdistill.evaluation.evaluate import cost_of, evaluate, predict
from kdistill.evaluation.examples import gather
from kdistill.evaluation.head_metrics import MAIN_METRIC, measure_output, per_example, without_hidden
from kdistill.evaluation.metrics import measure
from kdistill.evaluation.outputs import by_head, heads_of_runner, inputs_of_runner, masks_of, outputs_of
from kdistill.networks.heads import Head, logits_of_probabilities

Outputs = np.ndarray | dict[str, np.ndarray]


def images_with_a_class(splits: Splits) -> bool:
    """Whether the data are images, each with one class."""
    return splits.classifies and splits.has_images


def check_classifies(splits: Splits, command: str) -> None:
    """Raises `InputError` for labels other than one class for each example."""
    if not splits.classifies:
        raise InputError(
            f"{command} works where each example has one class; the labels here are {splits.head}. Use kdistill run."
        )


def metric_of(splits: Splits) -> str:
    """The name of the main metric: `accuracy`, or `mse`, of which less is better."""
    return "accuracy" if splits.classifies else MAIN_METRIC[next(iter(splits.outputs.values())).meaning]


def heads_in(model, splits: Splits) -> dict[str, Head]:
    """What the outputs of a model of the run mean, by the names of the model."""
    return heads_of_runner(model, splits.head)


def outputs_on(model, examples: Examples, splits: Splits) -> Outputs:
    """What a model gives: logits, float32 `[n, classes]`; of other labels `[n, ...]` by the names of the data."""
    if images_with_a_class(splits):
        return predict(model, examples.images)
    heads = heads_in(model, splits)
    inputs = gather(examples.inputs, inputs_of_runner(model), "inputs", with_labels=False).inputs
    outputs = by_head(outputs_of(model, inputs), heads)
    if splits.classifies:
        ((name, head),) = heads.items()
        return logits_of_probabilities(outputs[name]) if head.kind == "probabilities" else outputs[name]
    return named(outputs, splits)


def named(outputs: Mapping[str, np.ndarray], splits: Splits) -> dict[str, np.ndarray]:
    """Outputs of a model by the names of the data: of a single output that is empty."""
    return dict(zip(splits.outputs, outputs.values(), strict=True)) if len(splits.outputs) == 1 else dict(outputs)


def scores_of(model, outputs: Outputs, examples: Examples, splits: Splits) -> np.ndarray:
    """The score of each example, `[n]`: bool, whether its class is right; else the main metric (NaN: unlabeled)."""
    if splits.classifies:
        return outputs.argmax(axis=1) == examples.labels
    name, labels = next(iter(splits.outputs)), as_seen(model, examples, splits).labels
    heads = heads_in(model, splits)
    head = heads[name] if name in heads else next(iter(heads.values()))
    return per_example(head, outputs[name], labels[name] if isinstance(labels, Mapping) else labels, name or "output")


def as_seen(model, examples: Examples, splits: Splits) -> Examples:
    """The examples without the labels of positions that the model masks."""
    if splits.classifies:
        return examples
    inputs = gather(examples.inputs, inputs_of_runner(model), "inputs", with_labels=False).inputs
    masks = masks_of(model, inputs)
    if not masks:
        return examples
    labels = examples.labels if isinstance(examples.labels, Mapping) else {"": examples.labels}
    masks = masks if len(labels) > 1 else {"": next(iter(masks.values()))}
    hidden = {name: without_hidden(part, masks[name]) if name in masks else part for name, part in labels.items()}
    return dataclasses.replace(examples, labels=hidden.get("", hidden))


def mean_score(scores: np.ndarray) -> float:
    """The main metric over examples."""
    return float(np.nanmean(scores))


def measure_model(model, examples: Examples, outputs: Outputs, teacher: Outputs | None, splits: Splits) -> dict:
    """The row of a report for a Keras model: as `evaluate`, from what `outputs_on` has given."""
    if images_with_a_class(splits):
        return evaluate(model, examples, teacher_logits=teacher, logits=outputs)
    inputs = gather(examples.select(slice(1)).inputs, inputs_of_runner(model), "inputs", with_labels=False).inputs
    cost = cost_of(model, model, inputs)
    if splits.classifies:
        return {**measure(outputs, examples.labels, teacher), **cost}
    heads, labels = named(heads_in(model, splits), splits), as_seen(model, examples, splits).labels
    metrics = {
        name: measure_output(
            heads[name],
            outputs[name],
            labels[name] if isinstance(labels, Mapping) else labels,
            None,
            None if teacher is None else teacher[name],
            name or "output",
        )
        for name in splits.outputs
    }
    return {**by_output(metrics), **cost}


def measure_file(path, examples: Examples, teacher: Outputs, splits: Splits) -> dict:
    """The row of a report for a `.tflite`."""
    if splits.classifies:
        return evaluate(path, examples, teacher_logits=teacher)
    teacher = next(iter(teacher.values())) if len(teacher) == 1 else teacher
    row = evaluate(path, examples, teacher_logits=teacher)
    if len(splits.outputs) == 1:
        return row
    metrics = {name: row.pop(name) for name in splits.outputs}
    return {**by_output(metrics), **row}


def by_output(metrics: dict[str, dict]) -> dict:
    """The metrics of the first output, and of several outputs those of each under `outputs`."""
    first = next(iter(metrics.values()))
    return dict(first) if len(metrics) == 1 else {**first, "outputs": metrics}
