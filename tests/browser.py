"""Headless Chromium, spoken to over a pipe by the DevTools protocol; nothing but the browser is needed.

Messages are JSON that ends with a zero byte; the browser reads them from file 3 and writes to file 4.
"""

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
          "--no-first-run", "--remote-debugging-pipe", "--force-color-profile=srgb")  # fmt: skip
_WIRED = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find_browser() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """A browser with one tab; a context manager."""

    def __init__(self, program: str, profile: pathlib.Path) -> None:
        # Numbers above those that the child's ends become.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
        theirs_in, self._out, self._in, theirs_out = ends
        command = [sys.executable, "-c", _WIRED, str(theirs_in), str(theirs_out), program, *_FLAGS]
        with (profile / "browser.log").open("w") as log:
            self._process = subprocess.Popen(
                [*command, f"--user-data-dir={profile}"], pass_fds=(theirs_in, theirs_out), stderr=log, stdout=log
            )
        for end in (theirs_in, theirs_out):
            os.close(end)
        self._rest, self._number, self._session = b"", 0, None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Performance.enable", timeDomain="threadTicks")

    def call(self, method: str, **params: object) -> dict:
        """One command and its result; events that come first are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer.get('error')}"
                return answer["result"]
            self.events.append(answer)
            if answer.get("method") == "Page.javascriptDialogOpening":
                self._answer_dialog()

    def open(self, page: pathlib.Path, *, width: int = 1400, height: int = 900) -> None:
        """Load a file and wait until it says that it is ready."""
        self.resize(width, height)
        self.events.clear()
        # Through a blank page: a change of the part after # alone loads nothing.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=str(page) if "://" in str(page) else page.resolve().as_uri())
        deadline = time.monotonic() + 30
        while not self.run("document.documentElement?.dataset.ready !== undefined"):
            assert time.monotonic() < deadline, f"the page is not ready: {self.events}"
            time.sleep(0.02)

    def resize(self, width: int, height: int) -> None:
        """Give the tab a size in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, expression: str) -> object:
        """The value of an expression (awaited), as JSON has it."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key; `text` is what it would write."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def busy_s(self) -> float:
        """Processor time of the page's own thread until now: what other processes do does not count."""
        found = self.call("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in found if metric["name"] == "TaskDuration")

    def picture(self, path: pathlib.Path, *, whole: bool = False) -> None:
        """Write a PNG of what is seen, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[dict]:
        """Errors and warnings of the console, exceptions, dialogs, and requests for anything but the page and data."""
        self.run("0")
        wrong = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            url = params.get("request", {}).get("url", "")
            if (
                method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
                or (method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"))
                or (method == "Network.requestWillBeSent" and not url.startswith(("file:", "data:", "about:")))
            ):
                wrong.append(params)
        return wrong

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)

    def _answer_dialog(self) -> None:
        self._number += 1
        params = {"accept": True}
        message = {"id": self._number, "method": "Page.handleJavaScriptDialog", "params": params}
        os.write(self._out, json.dumps({**message, "sessionId": self._session}).encode() + b"\0")

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], 60)
            assert ready, "the browser does not answer"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser ended; see browser.log in its profile"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)
