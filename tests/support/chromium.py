"""Headless Chromium through its own pipe, without a driver: a page at a width, light or dark, and pictures of it."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
OFFLINE = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", *OFFLINE]


class Browser:
    """One page. `errors` holds what it could not load and what it complained of."""

    def __init__(self, sending: int, receiving: int) -> None:
        self.sending, self.receiving, self.rest, self.count = sending, receiving, b"", 0
        self.session: dict[str, str] = {}
        self.errors: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self.count += 1
        own = self.count
        message = dict(id=own, method=method, params=parameters, **self.session)
        os.write(self.sending, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != own:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.receiving, 1 << 20)
            assert part, "Chromium has ended"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        if message.get("method") in ("Network.loadingFailed", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(message["params"]))
        return message

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Show a file at a width in CSS pixels, as a phone does below 600."""
        phone = width < 600
        screen = dict(width=width, height=900, deviceScaleFactor=2 if phone else 1, mobile=phone)
        self.send("Emulation.setDeviceMetricsOverride", **screen)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=page.resolve().as_uri())
        self.run("document.readyState == 'complete' || new Promise(r => addEventListener('load', () => r(true)))")
        self.run(
            "Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.complete || "
            "new Promise(r => { i.onload = i.onerror = () => r(true) }) }))"
        )

    def run(self, script: str) -> Any:
        """Return the value of a script, awaited."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path, top: int = 0, height: int | None = None) -> None:
        """Write a PNG of the whole page, or of `height` pixels from `top` on."""
        width, full = self.run("[innerWidth, document.documentElement.scrollHeight]")
        clip = dict(x=0, y=top, width=width, height=height or full - top, scale=1)
        data = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def browser() -> Iterator[Browser]:
    """Run Chromium with an empty profile, and end it."""
    to_read, sending = os.pipe()
    receiving, to_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        wired = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'  # where Chromium reads commands, and where it answers
        process = subprocess.Popen(
            ["bash", "-c", wired, str(PROGRAM), *OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        try:
            yield Browser(sending, receiving)
        finally:
            process.terminate()
            process.wait(timeout=20)
            os.close(sending)
            os.close(receiving)
