"""A process that talks to a Hub for a test: it runs functions named on its standard input, a JSON object a line.

The client of the Hub freezes its environment when it is imported, so one such process serves one Hub.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]


class Client:
    """The parent's side: `client("module:function", *arguments, **options)` runs it there; errors come back as `ClientError`."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.log = folder / "client.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_client"],  # as a module: tests/ in the path would hide hub_upload
            env={**environment, "PYTHONPATH": str(ROOT)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def start(self, function: str, *arguments, **options) -> None:
        request = {"function": function, "arguments": arguments, "options": options}
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        self.process.stdin.flush()

    def __call__(self, function: str, *arguments, **options):
        self.start(function, *arguments, **options)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client died: {self.log.read_text()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class ClientError(Exception):
    """What the function raised, as text that begins with its type."""


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.modules["hub_client"] = sys.modules["__main__"]
    for line in sys.stdin:
        request = json.loads(line)
        module, _, name = request["function"].partition(":")
        try:
            result = getattr(importlib.import_module(module), name)(*request["arguments"], **request["options"])
            answer = {
                "result": json.loads(json.dumps(result, default=lambda value: getattr(value, "__dict__", str(value))))
            }
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def quick() -> None:
    """From now on nobody in this process sleeps for long, neither we nor the client between two tries."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.02))


def check_spaces_once() -> None:
    """From now on this process imports the app of a Space once for each content that it would push."""
    from hub_upload import space

    check, found = space.check_space, {}

    def remembered(folder: Path) -> list[str]:
        content = tuple((name, (Path(folder) / name).read_bytes()) for name in space.files_of(folder))
        if content not in found:
            found[content] = check(folder)
        return found[content]

    space.check_space = remembered


def log_in(token: str | None) -> None:
    """From now on this process has this token, or none."""
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token


if __name__ == "__main__":
    serve()
