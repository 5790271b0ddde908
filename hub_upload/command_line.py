"""The command lines of `hub_upload` and of `alignvlm`: mistyped options, and how a program ends that cannot do what was asked.

`run` is what every script calls: a user's mistake is told in one sentence, a fault of the program with its traceback.
"""

import argparse
import difflib
import linecache
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType


TRACEBACK_OPTION, TRACEBACK_VARIABLE = "--traceback", "ALIGNVLM_TRACEBACK"
MISTAKE = 2  # exit status
OURS = ("alignvlm", "hub_upload", "modeling_alignvlm", "demo")
# A launcher ends the other processes of a machine when the first has failed; who is alive after this many seconds has its own error to tell.
OTHERS_SECONDS = 10.0


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that takes no abbreviations, and checks the names of options before anything else, which may miss the
    mistyped one.

    Raises:
        SystemExit: with one sentence, for a name that is no option.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.suggest_on_error = True  # Python 3.14 and later: the nearest of an option's choices

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for item in args:
            if item == "--":  # what follows is no option
                break
            name = item.split("=", 1)[0]
            is_option = len(name) > 1 and name[0] in self.prefix_chars and " " not in item
            if is_option and not self._negative_number_matcher.match(item) and name not in self._option_string_actions:
                raise SystemExit(f"error: there is no option {name}.{hint(name, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        raise SystemExit(f"error: {message}")


def hint(name: str, valid: Iterable[str]) -> str:
    """Which of the valid names was meant, as the end of an error message."""
    words = name.lstrip("-").replace("-", "_")
    nearest = difflib.get_close_matches(f"--{words}" if name.startswith("-") else words, valid, 1)
    return f" Did you mean {nearest[0]}?" if nearest else " --help lists them all."


def positive(text: str) -> int:
    """The `type` of an option that counts something.

    Raises:
        argparse.ArgumentTypeError: for what is no whole number of 1 or more.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more.")
    return int(text)


def port(text: str) -> int:
    """The `type` of an option that names a port.

    Raises:
        argparse.ArgumentTypeError: for what is no whole number from 1 to 65535.
    """
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, a whole number from 1 to 65535.")
    return int(text)


def check_address(host: str, port: int) -> None:
    """Checks that something can be served there, before a model is loaded; Gradio would try a hundred ports, or name other options than ours.

    Args:
        host: a name or an address of this machine, IPv6 with or without brackets.
        port: 0: any.

    Raises:
        ValueError: for a host that is not this machine's, and a port that is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        option = f"--port {port}" if port else f"--host {host}"
        raise ValueError(
            f"Nothing can be served at {host}:{port or 'any port'}: {error.strerror or error}. Name another than {option}."
        ) from error


class Ended(SystemExit):
    """Ends a program whose sentence is printed; `str` of it is the sentence."""

    def __init__(self, sentence: str, status: int = MISTAKE):
        super().__init__(sentence)
        self.code = status


def run(main: Callable[[list[str]], object], argv: list[str] | None = None) -> None:
    """Runs a program's `main` on its command line.

    A user's mistake (`sentence_of`) is printed to stderr as one sentence, by one process of a machine; with `--traceback`, or
    ALIGNVLM_TRACEBACK=1 in the environment, below its traceback. All other errors pass through.

    Raises:
        Ended: after a mistake, with exit status 2; after Ctrl-C with 130.
    """
    argv = sys.argv[1:] if argv is None else argv
    asked = TRACEBACK_OPTION in argv or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")
    try:
        main([item for item in argv if item != TRACEBACK_OPTION])
    except Ended:
        raise
    except KeyboardInterrupt:
        _tell("interrupted", sys.exc_info()[1] if asked else None)
        raise Ended("interrupted", 130) from None
    except (Exception, SystemExit) as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        _tell(sentence, error if asked else None)
        raise Ended(sentence) from None


def sentence_of(error: BaseException) -> str | None:
    """Returns what to tell somebody who made a mistake; None for an error that is not a user's.

    A user's are: what a `raise` statement of this project says; what any library says of files and the network in words of its own, or of a
    file it names; and a `SystemExit` with a text. An error that just happens in our code, such as a failed `int()`, is a fault of ours.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else None
    in_words = isinstance(error, OSError) and (error.errno is None or error.filename is not None)
    if not in_words and not _is_raised_by_us(error):
        return None
    return f"error: {_message(error) or type(error).__name__}"


def _message(error: BaseException) -> str:
    """Returns the message; of an error in a data worker, that of the error itself, without the worker's traceback."""
    text = str(error).strip()
    if not _IN_A_WORKER.match(text):
        return text
    name = f"{type(error).__name__}: "
    return text.rpartition(f".{name}")[2] if f".{name}" in text else text.rpartition(name)[2]


_IN_A_WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.\n")
_PLACES = re.compile(r'^  File "(.+)", line (\d+), in ', re.MULTILINE)


def _is_raised_by_us(error: BaseException) -> bool:
    """Tells whether the error comes from a `raise` statement of our own files."""
    text = str(error)
    if _IN_A_WORKER.match(text):
        places = _PLACES.findall(text)
        file, line = places[-1] if places else ("", 0)
    elif (last := _last(error.__traceback__)) is None:
        return False
    else:
        file, line = last.tb_frame.f_code.co_filename, last.tb_lineno
    ours = any(Path(file).resolve().is_relative_to(folder) for folder in _folders())
    return ours and linecache.getline(file, int(line)).lstrip().startswith("raise ")


def _folders() -> list[Path]:
    root = Path(__file__).resolve().parents[1]
    return [root / name for name in OURS]


def _last(found: TracebackType | None) -> TracebackType | None:
    while found is not None and found.tb_next is not None:
        found = found.tb_next
    return found


def _tell(sentence: str, error: BaseException | None) -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(OTHERS_SECONDS)
    if error is not None:
        traceback.print_exception(error)
    print(sentence, file=sys.stderr, flush=True)
