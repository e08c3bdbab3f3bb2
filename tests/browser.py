"""A headless Chromium for tests, driven through chromedriver's HTTP interface (W3C WebDriver)."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
WHY_NOT = "" if CHROMIUM and DRIVER else "needs chromium and chromium-driver (apt-get install)"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element in the W3C standard
KEYS = {"Right": "\ue014", "Left": "\ue012", "Down": "\ue015", "Up": "\ue013", "Enter": "\ue007"}


class Browser:
    """One window."""

    def __init__(self, address: str, session: str):
        self.base = f"{address}/session/{session}"

    def call(self, command: str, **body: Any) -> Any:
        return _send(f"{self.base}/{command}", body)

    def open(self, address: str) -> None:
        self.call("url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function body returns; elements may be arguments."""
        return self.call("execute/sync", script=script, args=list(arguments))

    def find(self, selector: str) -> dict[str, str]:
        return self.call("element", using="css selector", value=selector)

    def console_errors(self) -> list[str]:
        lines = self.call("se/log", type="browser")
        return [line["message"] for line in lines if line["level"] in ("SEVERE", "WARNING")]

    def size(self, width: int, height: int, dark: bool = False) -> None:
        devtools = {
            "Emulation.setDeviceMetricsOverride": {
                "width": width,
                "height": height,
                "deviceScaleFactor": 1,
                "mobile": width < 500,
            },
            "Emulation.setEmulatedMedia": {
                "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            },
        }
        for name, parameters in devtools.items():
            self.call("goog/cdp/execute", cmd=name, params=parameters)

    def press(
        self, kind: str, element: dict, x: int = 0, y: int = 0, to: int | None = None
    ) -> None:
        """Press at (x, y) pixels from an element's centre; `to`: drag to this x before letting go.

        kind: mouse or touch.
        """
        steps = [_move(element, x, y), {"type": "pointerDown", "button": 0}]
        if to is not None:
            steps += [_move(element, (x + to) // 2, y), _move(element, to, y)]
        steps.append({"type": "pointerUp", "button": 0})
        source = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}}
        self.call("actions", actions=[{**source, "actions": steps}])

    def keys(self, *names: str) -> None:
        steps = [
            {"type": kind, "value": KEYS[name]} for name in names for kind in ("keyDown", "keyUp")
        ]
        self.call("actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def upload(self, element: dict, file: Path) -> None:
        self.call(f"element/{element[ELEMENT]}/value", text=str(file))

    def screenshot(self, file: Path, whole: bool = False) -> None:
        options = {"captureBeyondViewport": True} if whole else {}
        if whole:
            width, height = self.run(
                "const e = document.documentElement; return [e.clientWidth, e.scrollHeight]"
            )
            options["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("goog/cdp/execute", cmd="Page.captureScreenshot", params=options)
        file.write_bytes(base64.b64decode(shot["data"]))


def _move(element: dict, x: int, y: int) -> dict:
    return {"type": "pointerMove", "duration": 30, "origin": element, "x": x, "y": y}


def _send(address: str, body: dict | None, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        address, data, {"Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{address}: {error.read().decode()[:600]}") from None


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A window with a fresh profile; it and its driver end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                if _send(f"{address}/status", None, "GET")["ready"]:
                    break
            except OSError:
                time.sleep(0.2)
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = _send(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
        window = Browser(address, made["sessionId"])
        try:
            yield window
        finally:
            _send(window.base, None, "DELETE")
    finally:
        driver.terminate()
        driver.wait(30)
