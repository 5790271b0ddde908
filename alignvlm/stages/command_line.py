"""Dataclasses from a command line and a YAML file, as TRL reads them; a mistyped name is refused with the nearest valid one."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from hub_upload.command_line import hint


RENAMED = {"lora_rank": "lora_r", "lora_targets": "lora_target_modules"}


def parse_fields(argv: Iterable[str], *dataclasses: type, also: Iterable[str] = ()) -> tuple:
    """Makes one instance of each dataclass, from the options in `argv` and the YAML file that `--config` names.

    Args:
        argv: the command line.
        dataclasses: their fields are the options.
        also: fields that the caller has taken from the command line already; a mistyped name may have meant one of them.

    Raises:
        SystemExit: with one sentence, for a name that is no field, words that belong to no option, and a config file that cannot be
            read. What the dataclasses raise is passed on.
    """
    return _FieldParser(dataclasses, also).parse_args_and_config(argv)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file of fields.

    Raises:
        SystemExit: with one sentence that names the line, for a file that is not YAML or no mapping.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = str(error) if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        raise SystemExit(f"error: {path} is not valid YAML: {what}") from error
    if not isinstance(found, dict):
        raise SystemExit(f"error: {path} holds no fields; expected a line `name: value` for each.")
    return found


class _FieldParser(TrlParser):
    """`TrlParser` that takes no abbreviations, and checks all names before it makes the dataclasses, which may miss the mistyped one."""

    def __init__(self, dataclasses: Iterable[type], also: Iterable[str] = ()):
        super().__init__(dataclasses)
        given = [field for dataclass in dataclasses for field in fields(dataclass)]
        self.names = [field.name for field in given]
        switches = [f"no_{field.name}" for field in given if field.default is True]
        self.options = [*self.names, *switches, *also, "config", "help"]
        self.config = None

    def parse_args_and_config(self, args: Iterable[str], **options) -> tuple:
        args = [part for item in args for part in (item.split("=", 1) if item.startswith("--config=") else [item])]
        if "--config" in args:
            self.config = "".join(args[args.index("--config") + 1 :][:1])
            if not Path(self.config).is_file():
                raise SystemExit(f"error: --config needs a YAML file; there is no file {self.config!r}.")
            read_yaml(Path(self.config))
        try:
            return super().parse_args_and_config(args, **options)
        except ValueError as error:  # of ours, TRL's and transformers' checks of values alike
            raise ValueError(str(error)) from error

    def error(self, message: str) -> None:
        raise SystemExit(f"error: {message}")  # without the usage, which has hundreds of lines

    def set_defaults_with_config(self, **values) -> list[str]:
        for name in values:
            if name not in self.names:
                raise SystemExit(f"error: {self.config}: there is no field {name!r}.{_hint(name, self.names)}")
        return super().set_defaults_with_config(**values)

    def parse_known_args(self, args=None, namespace=None):
        for item in args:
            name = item.split("=", 1)[0]
            if not name.startswith("--") or " " in name or name.removeprefix("--").replace("-", "_") in self.options:
                continue
            raise SystemExit(f"error: there is no option {name}.{_hint(name, [f'--{each}' for each in self.options])}")
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            raise SystemExit(f"error: {' '.join(rest)!r} belongs to no option. Options are written as --name value.")
        return namespace, rest


def _hint(name: str, valid: Iterable[str]) -> str:
    """As `hint`, and the new name of a field that was renamed."""
    if renamed := RENAMED.get(name.removeprefix("--").replace("-", "_")):
        return f" Its name is {'--' if name.startswith('--') else ''}{renamed} now."
    return hint(name, valid)
