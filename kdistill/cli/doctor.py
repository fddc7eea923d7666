"""`kdistill doctor`: what kdistill finds on this machine."""

import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from kdistill import provenance
from kdistill.cli import surroundings
from kdistill.cli.app import Json, command, import_tensorflow
from kdistill.errors import InputError
from kdistill.files import cache_root

# What is installed only where it is asked for, and what lacks without it.
OPTIONAL = {
    "onnxruntime": 'teachers in .onnx files (pip install "kdistill[onnx]")',
    "litert-quantizer": 'int4 files (pip install "kdistill[int4]")',
}


@command
def doctor(as_json: Json = False):
    """Print versions, devices and folders, and what is missing: what to put into a report of a problem.

    The exit status is 0, also where something is missing.
    """
    findings = {
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "other versions than tested": _other_versions(),
        "missing": {name: lacks for name, lacks in OPTIONAL.items() if _version(name) is None},
        "folders": {"teacher cache": _folder(cache_root), "temporary files": _folder(tempfile.gettempdir)},
        "devices": _devices(),
        "accelerators": _accelerators(),
    }
    if as_json:
        print(json.dumps(findings, indent=1))
        return
    for title, value in findings.items():
        rows = value if isinstance(value, dict) else {"": value}
        for name, text in (rows or {"": "none"}).items():
            print(f"{title:<27} {surroundings.printable_line(f'{name} {text}'.strip())}")
            title = ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _other_versions() -> dict[str, str]:
    """Packages with another version than the one that kdistill is tested with: those of the extra `tested`."""
    try:
        lines = [line.partition(";")[0].strip() for line in requires("kdistill") or () if '"tested"' in line]
    except PackageNotFoundError:  # run from a source tree
        return {}
    tested = dict(line.split("==", 1) for line in lines)
    installed = {name: _version(name) for name in tested}
    return {
        name: f"{installed[name] or 'not installed'}, tested with {tested[name]}"
        for name in tested
        if installed[name] != tested[name]
    }


def _folder(find) -> str:
    """A folder, its free space, and whether it can be written."""
    try:
        folder = Path(find())
    except (InputError, OSError) as error:
        return f"unusable: {error}"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    writable = "" if os.access(existing, os.W_OK) else ", not writable"
    return f"{folder} ({free:.1f} GiB free{writable})"


def _accelerators() -> dict[str, str]:
    """What runs files beside plain CPU kernels, and what a GPU needs."""
    import tensorflow as tf

    build = tf.sysconfig.get_build_info()
    cuda = f"built for CUDA {build['cuda_version']}" if build.get("is_cuda_build") else "built without CUDA"
    litert = _version("ai-edge-litert")
    return {"TensorFlow": cuda, "LiteRT": f"{litert}, XNNPACK on the CPU" if litert else "not installed"}


def _devices() -> dict[str, str]:
    """The devices that TensorFlow sees, or why it does not start."""
    try:
        import_tensorflow()
    except (InputError, ImportError, OSError) as error:
        return {"TensorFlow does not start:": str(error)}
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu).get("device_name", "unknown") for gpu in gpus]
    return {"CPU": f"{os.cpu_count()} cores", "GPU": ", ".join(details) or "none: everything runs on the CPU"}
