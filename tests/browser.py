"""A browser without a window, driven over its debugging pipe: nothing to install but the browser itself."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROME = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """with Browser() as b: b.open(path); b.run("document.title")"""

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ours, theirs = os.pipe(), os.pipe()  # to the browser's file 3, from its file 4
        read, write = os.dup(ours[0]), os.dup(theirs[1])
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"]
        flags += ["--hide-scrollbars", f"--user-data-dir={self.profile.name}", "--remote-debugging-pipe"]

        def take():
            os.dup2(os.dup(read), 63)
            os.dup2(os.dup(write), 64)
            os.dup2(63, 3)
            os.dup2(64, 4)

        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen([CHROME, *flags], preexec_fn=take, pass_fds=(3, 4), **silent)
        for fd in (ours[0], theirs[1], read, write):
            os.close(fd)
        self.input, self.output, self.buffer, self.number = ours[1], theirs[0], b"", 0
        self.session, self.events = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *unused):
        self.process.kill()
        self.process.wait()
        os.close(self.input)
        os.close(self.output)
        self.profile.cleanup()

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _message(self, seconds=60):
        while b"\0" not in self.buffer:
            if not select.select([self.output], [], [], seconds)[0]:
                raise TimeoutError(f"no answer of {CHROME} in {seconds} s")
            block = os.read(self.output, 1 << 20)
            if not block:
                raise RuntimeError(f"{CHROME} ended")
            self.buffer += block
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def window(self, width, height, dark=False, scale=1):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path, wait="document.readyState === 'complete'"):
        """Seconds until the page at path is there."""
        began = time.perf_counter()
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=path if "://" in str(path) else f"file://{path}")
        while not self.run(f"location.href !== 'about:blank' && {wait}"):
            time.sleep(0.01)
        return time.perf_counter() - began

    def wait(self, condition, seconds=5):
        """Until a piece of JavaScript is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"not in {seconds} s: {condition}")
            time.sleep(0.05)

    def run(self, script):
        """The value of a piece of JavaScript; an exception in it is raised."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            exception = answer["exceptionDetails"].get("exception", {})
            raise RuntimeError(exception.get("description", "JavaScript error"))
        return answer["result"].get("value")

    def picture(self, path, **clip):
        """A screenshot of the window as PNG."""
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"]))
