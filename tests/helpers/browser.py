"""A headless Chromium, driven through chromedriver by the W3C WebDriver protocol."""

import base64
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # by the standard, the name of a reference


def chromium():
    """(browser, driver) on this machine, None where one of them is missing."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """A window of the browser, with a fresh profile in `folder`, until the `with` block ends."""

    def __init__(self, folder, width, height):
        self._flags = [*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"]

    def __enter__(self):
        self._browser, driver = chromium()
        self._driver = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        self._base = f"http://127.0.0.1:{found[1]}/session"
        self._base += "/" + self._ask("", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"binary": self._browser, "args": self._flags},
            "goog:loggingPrefs": {"browser": "ALL"}}}})["sessionId"]
        return self

    def __exit__(self, *_):
        try:
            self._ask("", method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait()
            self._driver.stdout.close()

    def _ask(self, path, body=None, method="POST"):
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._base + path, data, method=method, headers={
            "Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, path):
        self._ask("/url", {"url": path.as_uri()})

    def run(self, script, *args):
        """What the script, the body of a function, returns."""
        return self._ask("/execute/sync", {"script": script, "args": args})

    def click(self, css):
        found = self._ask("/element", {"using": "css selector", "value": css})
        self._ask(f"/element/{found[ELEMENT]}/click")

    def press(self, key):
        """A key, for whatever has the focus."""
        self._ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": [
            {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}]})

    def console(self):
        """What the console said, errors and warnings alike, since it was last asked."""
        return self._ask("/se/log", {"type": "browser"})

    def emulate(self, **media):
        """CSS media features, such as prefers_color_scheme="dark"."""
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in media.items()]
        self._ask("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia",
                                        "params": {"features": features}})

    def picture(self, path):
        path.write_bytes(base64.b64decode(self._ask("/screenshot", method="GET")))
