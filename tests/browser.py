"""A headless Chromium for tests of pages, over the DevTools protocol on two pipes: nothing to install but the browser.

`find_browser()` names the program (`apt-get install chromium`), or None; `Browser` is a context manager; `Browser.open` loads a file at
a given width and colour scheme and collects what the page did: console messages, errors, and requests.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--no-first-run",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    return next((found for found in map(shutil.which, NAMES) if found), None)


@dataclass
class Page:
    """What a page did while it was loaded and used."""

    browser: Browser
    session: str
    url: str
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.browser.call("Runtime.evaluate", self.session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def point_at(self, selector: str) -> None:
        """Move the mouse over the middle of the first element of a selector that is shown."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find(e => e.getBoundingClientRect().width > 0)"
        self.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({found}.getBoundingClientRect())")
        self.browser.call("Input.dispatchMouseEvent", self.session, type="mouseMoved", x=x, y=y)

    def screenshot(self, clip: dict[str, float] | None = None) -> bytes:
        """A PNG of the whole page, or of a part of it."""
        if clip is None:
            size = self.browser.call("Page.getLayoutMetrics", self.session)["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        arguments = {"format": "png", "captureBeyondViewport": True, "clip": clip | {"scale": 1}}
        return base64.b64decode(self.browser.call("Page.captureScreenshot", self.session, **arguments)["data"])


class Browser:
    """One browser process; it ends with the `with` block, whatever happens."""

    def __init__(self, program: str, profile: Path, timeout: float = 60.0) -> None:
        self.program, self.profile, self.timeout = program, profile, timeout
        self.calls = 0
        self.buffer = b""
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> Browser:
        to_read, self.to_browser = os.pipe()
        self.from_browser, to_write = os.pipe()
        # The browser wants its ends at 3 and 4: moved away first, so that neither is overwritten before it is copied.
        ends = [os.dup(end) for end in (to_read, to_write)]
        while min(ends) <= 4:
            ends = [os.dup(end) for end in ends]

        def move_pipes() -> None:
            for target, end in zip((3, 4), ends, strict=True):
                os.dup2(end, target)

        command = [self.program, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=move_pipes,
            pass_fds=(3, 4),
            start_new_session=True,
        )
        for end in (to_read, to_write, *ends):
            os.close(end)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.to_browser)
        os.close(self.from_browser)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()

    def open(self, path: Path, width: int = 1280, height: int = 900, scheme: str = "light", before: str = "") -> Page:
        """Load a file; `before` is a script that runs ahead of the page's own."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, path.as_uri())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", session, features=media)
        self.call("Emulation.setDeviceMetricsOverride", session, width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        if before:
            self.call("Page.addScriptToEvaluateOnNewDocument", session, source=before)
        self.call("Page.navigate", session, url=page.url)
        deadline = time.monotonic() + self.timeout
        ready = f"document.readyState === 'complete' && location.href === {json.dumps(page.url)}"
        while not page.evaluate(ready):
            assert time.monotonic() < deadline, f"{page.url} did not load"
            time.sleep(0.02)
        return page

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result; what happens meanwhile is noted with its page."""
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + self.timeout
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self.calls:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.from_browser], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self.from_browser, 1 << 20) if ready else b""
            assert chunk, "the browser does not answer" if not ready else "the browser ended"
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        page, parameters = self.pages.get(event.get("sessionId", "")), event.get("params", {})
        if page is None:
            return
        if event["method"] == "Runtime.consoleAPICalled":
            page.messages.append(f"console.{parameters['type']}: {[argument.get('value') for argument in parameters['args']]}")
        elif event["method"] == "Runtime.exceptionThrown":
            page.messages.append(f"exception: {parameters['exceptionDetails']}")
        elif event["method"] == "Log.entryAdded":
            page.messages.append(f"log {parameters['entry']['level']}: {parameters['entry']['text']}")
        elif event["method"] == "Network.requestWillBeSent":
            page.requests.append(parameters["request"]["url"])


def assert_silent_and_alone(page: Page) -> None:
    """Nothing on the console, no error, no policy violation, and no request but the page's own."""
    assert page.evaluate("1") == 1  # whatever happened is told before this answer
    assert page.messages == []
    assert page.requests == [page.url]


CUT_OFF = """[...document.querySelectorAll('main svg text')].filter(text => {
    const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
    return box.width > 0 && (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 2);
}).map(text => text.textContent)"""
"""Texts of drawings that are not wholly inside them."""


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"
