"""Runs commands of documentation pages, each in a fork of one process that has imported the libraries once.

    python command_server.py SOCKET

A page's shell blocks are run by bash, whose `python`, `alignvlm` and `accelerate` are `CLIENT`: it sends its words, folder,
environment and open files here, and ends with the exit status it is told. With ALIGNVLM_PARSE_ONLY=1 a command ends once its own argument
parser has taken the words.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import re
import runpy
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

import tomllib
import torch


ROOT = Path(__file__).resolve().parents[2]
CLIENT = """\
#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = [os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or 1))
"""
PRELOADED = (
    "alignvlm.evaluation.answer",
    "alignvlm.rows.collator",
    "evaluate",
    "peft",
    "tensorboard",
    "transformers.models.llava.modeling_llava",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.siglip.image_processing_pil_siglip",
    "transformers.models.siglip.modeling_siglip",
    "transformers.pipelines",
    "trl",
)
STARTS = {"alignvlm.evaluation.vlmeval_adapter": "vlmeval"}  # our modules that start somebody else's program


def preload() -> None:
    """Imports what commands import."""
    from alignvlm import cli

    for module in (*PRELOADED, *(module for module, _ in cli.COMMANDS.values())):
        importlib.import_module(module)
    gc.freeze()


def stop_behind_parsers() -> None:
    """Lets every argument parser end the process with status 0 once it has taken the words."""
    import click
    from trl import TrlParser
    from typer.core import TyperCommand

    def ending(method):
        def parse(*args, **kwargs):
            method(*args, **kwargs)
            raise SystemExit(0)

        return parse

    def ending_unless_group(method):
        def invoke(command, context):
            if not hasattr(command, "commands"):
                raise SystemExit(0)
            return method(command, context)

        return invoke

    for name in ("parse_args", "parse_intermixed_args"):
        setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))
    TrlParser.parse_args_and_config = ending(TrlParser.parse_args_and_config)
    # `transformers serve`: of click, or of the copy of click that typer has
    for command in {click.Command, *(each for each in TyperCommand.__mro__ if each.__name__ == "Command")}:
        command.invoke = ending_unless_group(command.invoke)


def check_installation(words: list[str]) -> None:
    """Refuses extras that pyproject.toml does not have; nothing is installed."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        found = re.match(r"(?:alignvlm|\.)\[(.*)\]$", word)
        if found and (unknown := set(found[1].split(",")) - set(extras)):
            raise SystemExit(f"pyproject.toml has no extra {', '.join(sorted(unknown))}.")


def run(name: str, words: list[str], parse_only: bool) -> None:
    """Does what the command does, in this process."""
    if name == "pip":
        return check_installation(words)
    if name == "accelerate":
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        command, *words = words
        if command != "launch":
            raise SystemExit(f"`accelerate {command}` is not known here.")
        given = launch_command_parser().parse_args(words)
        if given.config_file:
            load_config_from_file(given.config_file)
        name, words = "python", [*(["-m"] if given.module else []), given.training_script, *given.training_script_args]
    if parse_only:
        stop_behind_parsers()
    if parse_only and Path(words[0]).match("training/stage?.py") and not torch.accelerator.is_available():
        words = [*words, "--use_cpu", "true"]  # a recipe for a GPU is read where there is none
    if name == "alignvlm":
        words = ["-m", "alignvlm.cli", *words]
    sys.path.insert(0, os.getcwd())
    if parse_only and words[0] == "-m" and importlib.util.find_spec(STARTS.get(words[1], words[1])) is None:
        return  # somebody else's program, which is not installed
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")
    if parse_only:
        raise SystemExit(f"{' '.join(words)} was run, since it reads no arguments: it cannot be parsed only.")


def serve(address: str) -> None:
    """Answers one command after the other until it is killed."""
    preload()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            client, _ = server.accept()
            with client:
                request, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
                name, words, folder, environment = json.loads(request)
                child = os.fork()
                if not child:
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                    os._exit(finish(name, words, folder, environment))
                for file in files:
                    os.close(file)
                answer(client, child)


def answer(client: socket.socket, child: int) -> None:
    """Tells the client the exit status of a command; ends the command if the client has gone."""
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if select.select([client], [], [], 0.02)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
    with contextlib.suppress(OSError):
        client.send(str(os.waitstatus_to_exitcode(ended[1])).encode())


def finish(name: str, words: list[str], folder: str, environment: dict[str, str]) -> int:
    """Runs a command to its end, says what it raises, and returns its exit status."""
    code = 0
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        run(name, words, environment.get("ALIGNVLM_PARSE_ONLY") == "1")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])
