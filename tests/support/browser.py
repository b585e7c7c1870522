"""A real Chromium without a window, with real key presses and clicks, over its DevTools pipe.

https://chromedevtools.github.io/devtools-protocol/ describes the messages, JSON with a NUL behind each.
"""

from __future__ import annotations

import base64
import json
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(
        None,
        map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")),
    ),
    None,
)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
SECONDS = 60  # for one answer, on a machine that others use too

# Windows key codes: Chromium acts on keys such as Tab and the arrows by them.
KEYS = {
    **{"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36},
    **{"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40},
}
SHIFT = 8


class Page:
    """One page; whatever its script throws or logs ends the test."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self._buffer, self._last = process, b"", 0
        self._events: list[dict[str, Any]] = []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")

    _session: str | None = None

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask, and wait for the answer; events on the way are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._receive()).get("id") != self._last:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        pipe, until = self._process.stdout, time.monotonic() + SECONDS
        assert pipe
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0, until - time.monotonic()))
            assert ready, f"Chromium said nothing for {SECONDS} s"
            part = pipe.read1(1 << 16)  # type: ignore[attr-defined]
            assert part, "Chromium ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        fault = event.get("method") in (
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
        )
        assert not fault, event
        self._events.append(event)

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Load ``url`` in a window of that many CSS pixels and wait until its script has run."""
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self._send("Page.navigate", url="about:blank")  # else a new fragment loads nothing
        self._events.clear()
        self._send("Page.navigate", url=url)
        while not self.run("document.URL !== 'about:blank' && document.readyState === 'complete'"):
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        done = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press and release keys: names of :data:`KEYS`, or single characters."""
        for key in keys:
            event: dict[str, Any] = {"key": key, "modifiers": SHIFT if shift else 0}
            event["windowsVirtualKeyCode"] = KEYS.get(key, 0)
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            self._send("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
            self._send("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, element: str) -> None:
        """Click into the middle of what a JavaScript expression gives; it must be there to be hit."""
        x, y = self.run(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])(({element}).getClientRects()[0])"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def prefer(self, scheme: str) -> None:
        """``light`` or ``dark`` from the next page on."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._send("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """What the window shows, as a PNG file."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot")["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A browser with its own ``profile`` folder. Its DevTools pipe is file 3 and 4 of its process."""
    assert CHROMIUM
    script = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    with subprocess.Popen(
        ["sh", "-c", script, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield Page(process)
        finally:
            process.kill()
