"""`alignvlm chat` in a terminal."""

import os
import pty
import select
import sys
import time

import pytest


def read(terminal: int, ending: str, seconds: float = 120) -> str:
    """What the program writes until it has written `ending`."""
    text, deadline = "", time.monotonic() + seconds
    while ending not in text and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                text += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # it has ended
                break
    return text


@pytest.mark.slow
def test_the_arrow_keys_bring_lines_back(checkpoint):
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-m", "alignvlm.cli", "chat", str(checkpoint), "--use_cpu"])
    try:
        assert "/help lists the commands" in read(terminal, "> ")
        os.write(terminal, b"/nope\n")
        assert "There is no command /nope" in read(terminal, "does\r\n")
        os.write(terminal, b"\x1b[A\n")
        assert "There is no command /nope" in read(terminal, "does\r\n")
        os.write(terminal, b"/quit\n")
        read(terminal, "never", 10)
    finally:
        os.close(terminal)
        _, status = os.waitpid(child, 0)
    assert status == 0
