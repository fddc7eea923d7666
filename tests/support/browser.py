"""Headless Chromium over the WebDriver protocol of chromedriver, standard library only: for tests and screenshots."""

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs chromium and chromedriver (Debian: apt-get install chromium-driver)"
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


class Browser:
    """One window. Use it as a context manager, so that both processes and the profile's folder go away."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.address = f"http://127.0.0.1:{port}/session"
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        options = {"binary": CHROMIUM, "args": [*QUIET, f"--user-data-dir={self.profile.name}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        deadline = time.monotonic() + 30
        while True:
            try:
                self.address += "/" + self._send("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
                return self
            except ConnectionError:
                time.sleep(0.1)
            except OSError:  # urllib's URLError: nobody listens yet
                time.sleep(0.1)
            if time.monotonic() > deadline:
                self.__exit__()
                raise TimeoutError("chromedriver does not answer")

    def __exit__(self, *_) -> None:
        try:
            if "/session/" in self.address:
                self._send("", method="DELETE")
        finally:
            self.process.terminate()
            self.process.wait(timeout=30)
            self.profile.cleanup()

    def _send(self, path: str, body: dict | None = None, method: str = "POST"):
        data = None if method == "DELETE" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            self.address + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        with self.opener.open(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def faults(self, path: Path) -> list[str]:
        """What is wrong with a page: console messages, requests, pictures that do not load, a width beyond the window.

        It is looked at as a phone and as a desk shows it, in both themes, with everything that can be unfolded open.
        """
        found = []
        for width, dark in ((375, False), (375, True), (1280, False), (1280, True)):
            self.open("about:blank")
            self.console(), self.requests()
            self.look(width, dark=dark)
            self.open(path.as_uri())
            unfold = "document.querySelectorAll('details').forEach(each => each.open = true); "
            wide = self.run(unfold + "return document.documentElement.scrollWidth")
            inner = self.run("return window.innerWidth")
            if max(wide, inner) > width:
                found.append(f"{width}: {max(wide, inner)} pixels wide")
            broken = self.run("return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)")
            found += [f"{width}: no picture '{each}'" for each in broken]
            found += [f"{width}: {each}" for each in self.console()]
            found += [f"{width}: asks for {each}" for each in self.requests() if each != path.as_uri()]
        return found

    def look(self, width: int, height: int = 800, dark: bool = False, scale: float = 1) -> None:
        """A viewport of so many CSS pixels, and the theme that the system prefers."""
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, address: str) -> None:
        """Opens a page and waits until it has loaded."""
        self._send("/url", {"url": address})

    def run(self, script: str):
        """What the body of a JavaScript function returns."""
        return self._send("/execute/sync", {"script": script, "args": []})

    def press(self, key: str, code: int) -> None:
        """One key, such as ("Tab", 9)."""
        numbers = {"windowsVirtualKeyCode": code, "nativeVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.devtools("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key, **numbers, **text})

    def devtools(self, command: str, options: dict | None = None) -> dict:
        """One command of the DevTools protocol."""
        return self._send("/goog/cdp/execute", {"cmd": command, "params": options or {}})

    def console(self) -> list[str]:
        """What the console has received since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._send("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The address of everything that was asked for since the last call, without data: addresses."""
        messages = [json.loads(entry["message"])["message"] for entry in self._send("/se/log", {"type": "performance"})]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith("data:")]

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A PNG of the viewport, or of the whole page."""
        options: dict = {"format": "png"}
        if whole:
            size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
            options |= {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        path.write_bytes(base64.b64decode(self.devtools("Page.captureScreenshot", options)["data"]))
