"""Headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any


class Browser:
    """A browser with one page, as a context manager that stops it at the end.

    `page_errors` lists the page's exceptions and security errors; refused requests are not among them.
    """

    def __init__(self, program: str) -> None:
        self.page_errors: list[str] = []
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
        for domain in ("Page", "Runtime", "Log", "DOM"):
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
            self._record_error(message)
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
        """Wait until the JavaScript condition holds. Raises RuntimeError with the page's text after the timeout."""
        poll = (
            "new Promise((done, fail) => { const end = Date.now() + %d; const poll = () => { if (%s) done(); "
            "else if (Date.now() > end) fail(document.body.innerText); else setTimeout(poll, 10); }; poll(); })"
        )
        self.evaluate(poll % (1000 * timeout_s, condition))

    def drop(self, selector: str, path: Path) -> None:
        """Drag a file onto the centre of an element."""
        box = self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

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

    def _record_error(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.page_errors.append(parameters["exceptionDetails"]["text"])
        if message.get("method") == "Log.entryAdded":
            entry = parameters["entry"]
            if (entry["level"], entry["source"]) == ("error", "security"):
                self.page_errors.append(entry["text"])
