"""Takes the pictures in docs/images from a finished run, in headless Chromium: its page, and its logs in TensorBoard.

    kdistill run mnist
    python docs/screenshots.py runs/mnist-default-1

Needs chromium and chromedriver (Debian: apt-get install chromium-driver). The page is checked first, as in the tests: a
message on the console, a request, a picture that does not load, or horizontal scrolling gives exit status 1.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support.browser import MISSING, Browser  # noqa: E402

LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # local addresses need no proxy
LARGEST = 200_000  # bytes of a picture
CHARTS = "return document.querySelectorAll('line-chart svg path').length"


def keep(window: Browser, path: Path) -> None:
    """Saves the viewport as a PNG of 256 colors: a third of the bytes, without a visible difference."""
    window.screenshot(path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size:,} bytes")
    if size > LARGEST:
        sys.exit(f"{path} is larger than {LARGEST:,} bytes.")


def page(window: Browser, run: Path, out: Path) -> None:
    """The report: on a desktop in the light theme, on a phone in the dark one."""
    report = (run / "report.html").resolve()
    faults = window.faults(report)
    if faults:
        sys.exit("\n".join(faults))
    for name, width, height, dark, scale in (("report", 1280, 1000, False, 1), ("report-phone", 375, 760, True, 1.5)):
        window.look(width, height, dark, scale)
        window.open(report.as_uri())
        keep(window, out / f"{name}.png")
    window.look(1280, 760, dark=False)
    window.open(report.as_uri())
    for name in ("training", "calibration"):
        window.run(f"document.documentElement.style.scrollBehavior = 'auto'; location.hash = '{name}'")
        time.sleep(0.3)
        keep(window, out / f"report-{name}.png")


def tensorboard(window: Browser, run: Path, out: Path) -> None:
    """The scalars of teacher, control and student."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", run / "logs", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, "--load_fast", "false"], stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}/"
            wait(lambda: answers(address), "TensorBoard does not answer")
            window.look(1280, 900, dark=False)
            window.open(f"{address}?tagFilter=epoch_%28accuracy%7Cagreement%7Chard%7Ckd%29&smoothing=0#timeseries")
            wait(lambda: window.run(CHARTS) >= 8, "TensorBoard draws no charts")
            time.sleep(5)  # until all lines are drawn
            keep(window, out / "tensorboard.png")
        finally:
            server.terminate()
            server.wait(timeout=30)


def answers(address: str) -> bool:
    try:
        return LOCAL.open(address, timeout=5).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def wait(ready, message: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            sys.exit(f"{message} within {seconds:.0f} seconds.")
        time.sleep(0.5)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("run", type=Path, help="folder of a finished run")
    arguments.add_argument("--out", type=Path, default=ROOT / "docs/images")
    options = arguments.parse_args()
    if MISSING:
        sys.exit(MISSING)
    options.out.mkdir(parents=True, exist_ok=True)
    with Browser() as window:
        page(window, options.run, options.out)
        tensorboard(window, options.run, options.out)


if __name__ == "__main__":
    main()
