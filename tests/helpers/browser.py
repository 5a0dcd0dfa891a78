"""Headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest


def chromium() -> str:
    """Return the program, or skip the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed")
    return program


class Browser:
    """A browser with one page, as a context manager that stops it at the end.

    `page_errors` lists the page's exceptions and security errors; refused requests are not among them. `requests` lists
    the URLs that the page has asked for, but those of its own data (data:).
    """

    def __init__(self, program: str) -> None:
        self.page_errors: list[str] = []
        self.requests: list[str] = []
        self._last_id = 0
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._commands = os.pipe()
        self._messages, messages = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--window-size=1000,800"]
        # Chromium reads from file descriptor 3 and writes to 4; each message ends with a zero byte.
        script = f'exec 3<&{commands} 4>&{messages}; exec "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", program, *flags, "about:blank"],
            pass_fds=(commands, messages),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(messages)
        self._received = b""
        self._session_id: str | None = None
        pages = self.send("Target.getTargets")["targetInfos"]
        (page_id,) = [page["targetId"] for page in pages if page["type"] == "page"]
        self._session_id = self.send("Target.attachToTarget", targetId=page_id, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._commands)
        os.close(self._messages)
        self._profile.cleanup()

    def send(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result. Raises RuntimeError if it fails."""
        self._last_id += 1
        command = {"id": self._last_id, "method": method, "params": parameters}
        if self._session_id is not None:
            command["sessionId"] = self._session_id
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._next_message()).get("id") != self._last_id:
            self._record(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def open(self, url: str) -> None:
        """Navigate to the URL and wait until the page has loaded."""
        self.send("Page.navigate", url=url)
        self.wait_until("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript in the page, waiting for a promise, and return its value."""
        response = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in response:
            raise RuntimeError(f"{expression}: {response['exceptionDetails']}")
        return response["result"].get("value")

    def wait_until(self, condition: str, timeout_s: float = 20.0) -> None:
        """Wait until the JavaScript condition holds, though the page may reload itself meanwhile. Raises RuntimeError
        with the page's text after the timeout."""
        poll = (
            "new Promise((done, fail) => { const end = Date.now() + %d; const poll = () => { if (%s) done(); "
            "else if (Date.now() > end) fail(document.body.innerText); else setTimeout(poll, 10); }; poll(); })"
        )
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.evaluate(poll % (1000 * (deadline - time.monotonic()), condition))
                return
            except RuntimeError as error:
                if "navigated" not in str(error) or time.monotonic() > deadline:
                    raise

    def drop(self, selector: str, *paths: Path) -> None:
        """Drag files onto the centre of an element."""
        box = self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def move(self, x: float, y: float, *, drags: bool = False) -> None:
        """Move the pointer to a position in the visible part of the page, with the left button down if it drags."""
        button: dict[str, Any] = {"button": "left", "buttons": 1} if drags else {}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, **button)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag with the left button from one position to another."""
        self.move(*start)
        button = {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], buttons=1, **button)
        for share in (0.1, 0.5, 1.0):
            self.move(*(begin + share * (stop - begin) for begin, stop in zip(start, end, strict=True)), drags=True)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], **button)

    def double_click(self, x: float, y: float) -> None:
        """Click twice with the left button."""
        for count in (1, 2):
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def touch(self, x: float, *heights: float) -> None:
        """Put a finger at (x, the first of the heights), move it to the others, and take it away."""
        for kind, y in zip(["touchStart", *["touchMove"] * (len(heights) - 1)], heights, strict=True):
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, path: Path) -> None:
        """Write a PNG file of the visible part of the page."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def _next_message(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            chunk = os.read(self._messages, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._received += chunk
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _record(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.page_errors.append(parameters["exceptionDetails"]["text"])
        if message.get("method") == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            self.requests += [] if url.startswith("data:") else [url]
        if message.get("method") == "Log.entryAdded":
            entry = parameters["entry"]
            if (entry["level"], entry["source"]) == ("error", "security"):
                self.page_errors.append(entry["text"])
