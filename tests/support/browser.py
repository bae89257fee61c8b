"""A headless Chromium (Debian's) led by its driver: W3C WebDriver, which is JSON over HTTP."""

import base64
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.head import free_port
from tests.support.prometheus import tool

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
TAB, ENTER, SPACE = "\ue004", "\ue007", "\ue00d"
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Browser:
    """One window. The log of its requests and console is kept."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 1000) -> None:
        self._folder, self._size = folder, (width, height)
        self._driver = f"http://127.0.0.1:{free_port()}"
        self._session = ""

    def __enter__(self) -> "Browser":
        with (self._folder / "chromedriver.log").open("wb") as log:
            command = [tool("chromedriver"), f"--port={self._driver.rpartition(':')[2]}"]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self.wait_until(self._is_ready, "the driver")
            width, height = self._size
            options = {
                "binary": tool("chromium"),
                "args": [*ARGUMENTS, f"--window-size={width},{height}", f"--user-data-dir={self._folder}/profile"],
            }
            capabilities = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
            self._session = f"/session/{made['sessionId']}"
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self._call("DELETE", self._session)
        finally:
            self._process.terminate()
            self._process.wait(20)

    def _is_ready(self) -> bool:
        try:
            return bool(self._call("GET", "/status")["ready"])
        except OSError:
            return False

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    # --- what a user does ---------------------------------------------------------------------------------------

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": url})

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element."""
        found = self._call("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        self._call("POST", f"{self._session}/element/{found[ELEMENT]}/click", {})

    def press(self, *keys: str) -> None:
        """One after another, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self._call("POST", f"{self._session}/actions", {"actions": [keyboard]})

    # --- what a user sees ---------------------------------------------------------------------------------------

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": f"return {script}", "args": []})

    def text(self, selector: str) -> str:
        return str(self.ask(f"document.querySelector({json.dumps(selector)}).innerText"))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What came since the last call: `browser` for its console, `performance` for its requests."""
        entries: list[dict[str, Any]] = self._call("POST", f"{self._session}/se/log", {"type": kind})
        return entries

    def prefer(self, scheme: str, width: int | None = None) -> None:
        """Light or dark; and a width of the window in pixels."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._devtools("Emulation.setEmulatedMedia", media)
        if width is not None:
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            self._devtools("Emulation.setDeviceMetricsOverride", metrics)

    def screenshot(self, path: Path) -> None:
        """Of the whole page."""
        taken = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        path.write_bytes(base64.b64decode(taken["data"]))

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._call("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    @staticmethod
    def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
            time.sleep(0.05)
