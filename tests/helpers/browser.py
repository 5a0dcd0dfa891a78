"""A headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any


class Browser:
    """One page. A context manager: the end stops the browser.

    `complaints` are the page's own: exceptions, and what the console shows of errors but refused requests.
    """

    def __init__(self, program: str) -> None:
        self.complaints: list[str] = []
        self._number = 0
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._commands = os.pipe()
        self._messages, messages = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--window-size=1000,800"]
        # It reads from file 3 and writes to file 4, messages that end with a zero.
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
        self._session: str | None = None
        pages = self.do("Target.getTargets")["targetInfos"]
        (page,) = [page["targetId"] for page in pages if page["type"] == "page"]
        self._session = self.do("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.do(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._commands)
        os.close(self._messages)
        self._profile.cleanup()

    def do(self, method: str, **parameters: Any) -> Any:
        """A command's result. Raises RuntimeError for its failure."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._next_message()).get("id") != self._number:
            self._note(message)
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.wait_until("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page, of a promise what it promises."""
        found = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_until(self, condition: str, seconds: float = 20.0) -> None:
        looking = (
            "new Promise((done, fail) => { const end = Date.now() + %d; const look = () => { if (%s) done(); "
            "else if (Date.now() > end) fail(document.body.innerText); else setTimeout(look, 10); }; look(); })"
        )
        self.evaluate(looking % (1000 * seconds, condition))

    def drop(self, selector: str, path: Path) -> None:
        """Drags a file from outside onto the middle of an element."""
        box = self.evaluate(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        dragged = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.do("Input.dispatchDragEvent", type=kind, x=x, y=y, data=dragged)

    def choose(self, selector: str, path: Path) -> None:
        """Chooses a file in a file input."""
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.do("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot")["data"]))

    def _next_message(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            part = os.read(self._messages, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"]["text"])
        if message.get("method") == "Log.entryAdded" and (told["entry"]["level"], told["entry"]["source"]) == (
            "error",
            "security",
        ):
            self.complaints.append(told["entry"]["text"])
