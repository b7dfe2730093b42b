"""A real browser for tests: headless Chromium, driven over its DevTools pipe; no driver needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Browser", "chromium", "find_chromium"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 30.0
# Chromium reads commands from descriptor 3 and answers on 4: the pipes are put there first.
_WIRED = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(high[0], 3), os.dup2(high[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The program, by EMBEDKIT_CHROMIUM or by one of its usual names."""
    named = os.environ.get("EMBEDKIT_CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with one empty tab, ended with the block."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", _WIRED, str(to_read), str(from_write), program),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--force-prefers-reduced-motion", f"--user-data-dir={profile}", "about:blank"),
        ],
        pass_fds=(to_read, from_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    with os.fdopen(to_write, "wb") as commands, os.fdopen(from_read, "rb") as answers:
        try:
            yield Browser(commands, answers)
        finally:
            process.terminate()
            process.wait(timeout=_SECONDS)


class Browser:
    """One tab."""

    def __init__(self, commands: Any, answers: Any) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._session = 0, ""
        self.messages: list[str] = []  # what the page complained about
        (tab, *_) = [
            one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"
        ]
        attached = self._call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Go there; the page's own work may still be going on."""
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        done = self._call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise AssertionError(f"{script}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def wait(self, script: str) -> Any:
        """As `run`, again and again until the value is true."""
        end = time.monotonic() + _SECONDS
        while not (value := self.run(script)):
            if time.monotonic() > end:
                page = self.run("document.body.innerText")
                raise AssertionError(f"never true: {script}\n{page}\n{self.messages}")
            time.sleep(0.02)
        return value

    def look(
        self, width: int = 1200, height: int = 800, *, dark: bool = False, phone: bool = False
    ) -> None:
        """The size of the window, and the colours its owner likes."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """What a person would see."""
        data = self._call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def middle(self, selector: str) -> tuple[float, float]:
        """Where an element is, scrolled into view."""
        x, y = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            "one.scrollIntoView({block: 'nearest'}); const box = one.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return x, y

    def click(self, selector: str) -> None:
        """With the mouse, in its middle."""
        x, y = self.middle(selector)
        self.drag((x, y), (x, y))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the left button from here to there."""
        for kind, (x, y), buttons in (
            ("mouseMoved", start, 0),
            ("mousePressed", start, 1),
            ("mouseMoved", end, 1),
            ("mouseReleased", end, 0),
        ):
            button = "none" if kind == "mouseMoved" and not buttons else "left"
            self._call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button=button,
                buttons=buttons,
                clickCount=1,
            )

    def drop(self, file: Path, selector: str) -> None:
        """A file from the desktop onto an element."""
        x, y = self.middle(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self._call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def key(self, name: str, code: int, text: str = "") -> None:
        """Press and let go."""
        facts = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        press = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self._call("Input.dispatchKeyEvent", **press, **facts)
        self._call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        piece = bytearray()
        while not piece.endswith(b"\0"):
            letter = self._answers.read(1)
            if not letter:
                raise AssertionError("the browser has ended")
            piece += letter
        answer: dict[str, Any] = json.loads(piece[:-1])
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(event["params"]["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded":
            self.messages.append(event["params"]["entry"]["text"])
