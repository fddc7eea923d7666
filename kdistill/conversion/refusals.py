"""Why TFLite's converter refuses a model or crashes on it: the operator, its layer, and the way out."""

import signal

import keras

from kdistill.conversion import worker
from kdistill.conversion.graph import layer_names, layer_of
from kdistill.conversion.tflite_converter import Job, Refusal
from kdistill.conversion.worker import Crash
from kdistill.errors import InputError
from kdistill.networks.keras_internals import layers_of
from kdistill.recipe import Profile

LISTS = "TensorList"  # operators of loops begin so: LiteRT has them for a fixed batch size only
UNROLL = "Build {them} with unroll=True and give the new model the same weights (new.set_weights(model.get_weights()))"


def refused(model: keras.Model, profile: Profile, refusal: Refusal) -> InputError:
    """The error for a model that the converter refuses."""
    if any(name.startswith(LISTS) for name, _ in refusal.operators):
        return _loop_refused(model, profile, refusal)
    names, operators = layer_names(model), {}
    for name, call in refusal.operators:
        layer = layer_of(call.partition("@")[0], names)
        operators[f"'{name}'" + (f" of layer '{layer}'" if layer else "")] = None
    if operators:
        return InputError(
            f"The model '{model.name}' cannot be exported for '{profile.name}': LiteRT has no builtin operator for "
            f"{', '.join(operators)}. Replace that layer or function."
        )
    return InputError(f"The model '{model.name}' cannot be converted for '{profile.name}': {refusal.text}")


def _loop_refused(model: keras.Model, profile: Profile, refusal: Refusal) -> InputError:
    """LiteRT has no list of tensors, in which a loop collects its outputs, where the batch size is open."""
    operator, call = next((name, call) for name, call in refusal.operators if name.startswith(LISTS))
    recurrent = recurrent_layers(model)
    subject = _recurrent(recurrent) or f"the loop{_of_layer(call, model)}"
    unroll = f"{_unroll(recurrent)}." if recurrent else "Write the loop as a fixed number of steps."
    if profile.batch is not None:
        way = unroll
    elif profile.quantization == "int8":
        way = f"{unroll} A fixed batch size is not enough with int8."
    else:
        way = f"Use a profile with batch=1, such as phone_gpu or mediapipe. Or: {unroll[0].lower()}{unroll[1:]}"
    return InputError(
        f"The model '{model.name}' cannot be exported for '{profile.name}': LiteRT has no operator '{operator}', which "
        f"{subject} needs{' with an open batch size' if profile.batch is None else ''}. {way}"
    )


def crashed(model: keras.Model, profile: Profile, job: Job, crash: Crash) -> InputError:
    """The error for a model on which the quantizer has crashed, or took too long."""
    if crash.status is None:
        return InputError(
            f"The model '{model.name}' cannot be exported for '{profile.name}': TFLite's quantizer did not finish "
            f"within {worker.SECONDS:,} s. Give fewer calibration images, or use a profile without int8 (phone_cpu)."
        )
    ended = f"exit status {crash.status}" + (f": {crash.text}" if crash.text else "")
    if crash.status < 0:
        ended = f"signal {-crash.status}, {signal.strsignal(-crash.status)}"
    begin = f"The model '{model.name}' cannot be exported for '{profile.name}': TFLite's quantizer crashed ({ended})."
    if crash.status == -9:  # SIGKILL exists on some systems only
        return InputError(
            f"{begin} Memory ran out, or someone ended the process. Give fewer calibration images, free memory, or try "
            "again."
        )
    return InputError(f"{begin} {_fault(model, job)}")


def _fault(model: keras.Model, job: Job) -> str:
    """What the quantizer has crashed on, probably, and the way out."""
    others = "use a profile without int8, such as phone_cpu"
    recurrent = recurrent_layers(model)
    # Loops of recurrent layers always end in a crash, so that nothing else is searched for.
    fault = worker.find_fault(job) if job.quantization == "int8" and not recurrent else None
    if fault and fault["kind"] == "not finite":
        return (
            f"Its operator {fault['operator']}{_of_layer(fault['tensor'], model)} gives numbers that are NaN or "
            "infinite on the calibration images: they have no range. Keep its input away from such values, as "
            f"log(x + 1e-3) does for the zeros after a ReLU, or {others}."
        )
    if recurrent:
        return (
            f"It cannot quantize the loop of {_recurrent(recurrent)}. {_unroll(recurrent)}, or use a profile with "
            "batch=1 without int8, such as phone_gpu."
        )
    if fault:
        return (
            f"It cannot quantize the loop{_of_layer(fault['tensor'], model)}. Write it as a fixed number of steps, or "
            "use a profile with batch=1 without int8, such as phone_gpu."
        )
    return f"Replace unusual layers or functions of the model one at a time to find the one at fault, or {others}."


def recurrent_layers(model: keras.Model) -> list[str]:
    """The names of the recurrent layers that run in a loop, of a `Bidirectional` one its own."""
    layers = layers_of(model)
    inside = {
        id(inner) for layer in layers if isinstance(layer, keras.layers.Bidirectional) for inner in layers_of(layer)
    }
    names = []
    for layer in layers:
        parts = layers_of(layer) if isinstance(layer, keras.layers.Bidirectional) else [layer]
        looping = any(isinstance(part, keras.layers.RNN) and not part.unroll for part in parts)
        if looping and id(layer) not in inside:
            names.append(layer.name)
    return names


def _recurrent(names: list[str]) -> str:
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"the recurrent layer{'s' if len(names) > 1 else ''} {quoted}" if names else ""


def _unroll(names: list[str]) -> str:
    return UNROLL.format(them="it" if len(names) == 1 else "them")


def _of_layer(tensor: str, model: keras.Model) -> str:
    layer = layer_of(tensor.partition("@")[0], layer_names(model))
    return f" of layer '{layer}'" if layer else f" ('{tensor}')" if tensor else ""
