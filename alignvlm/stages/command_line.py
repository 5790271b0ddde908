"""Dataclasses from a command line and a YAML file, as TRL reads them; mistyped names and values of a wrong type are refused."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from alignvlm.data.record import shown
from hub_upload.command_line import hint
from modeling_alignvlm import AlignVLMConfig


# What YAML can hold, in the words of an error message.
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}
ALSO_TRUE = ("resume_from_checkpoint", "fsdp")  # texts that transformers takes as true or false, too
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # 1e-4, which YAML 1.1 reads as a text
# Fields that keep what the checkpoint has where they are left out, which is how TRL reads `none`; and what turns them off.
OFF = {"merge_image_tokens": "0", "max_tiles": "1", "tile_marks": "false"}
RENAMED = {"lora_rank": "lora_r", "lora_targets": "lora_target_modules"}


def parse_fields(argv: Iterable[str], *dataclasses: type, also: Iterable[str] = ()) -> tuple:
    """Makes one instance of each dataclass, from the options in `argv` and the YAML file that `--config` names.

    Args:
        argv: the command line.
        dataclasses: their fields are the options.
        also: fields that the caller has taken from the command line already; a mistyped name may have meant one of them.

    Raises:
        SystemExit: with one sentence, for a name that is no field, words that belong to no option, and a config file that cannot be
            read or holds a value that its field does not take. What the dataclasses raise is passed on.
    """
    return _FieldParser(dataclasses, also).parse_args_and_config(argv)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file of fields.

    Raises:
        SystemExit: with one sentence that names the line, for a file that is not YAML or no mapping, or names something twice.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _EachNameOnce)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = str(error) if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
        raise SystemExit(f"error: {path} is not valid YAML: {what}") from error
    except UnicodeDecodeError as error:
        raise SystemExit(f"error: {path} is no text in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise SystemExit(f"error: {path} holds no fields; expected a line `name: value` for each.")
    return found


class _EachNameOnce(yaml.SafeLoader):
    """YAML as `yaml.safe_load` reads it, but for a mapping that holds a name twice, of which that would take the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        found = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value in found:
                problem = f"{name.value!r} stands here for the second time; leave one of them out"
                raise yaml.composer.ComposerError(problem=problem, problem_mark=name.start_mark)
            found.add(name.value if isinstance(name, yaml.ScalarNode) else None)
        return node


def _kinds(hint: Any) -> set[Any]:
    """Returns the types that an annotation allows, without what lists and mappings hold."""
    if get_origin(hint) in (Union, UnionType):
        return {kind for part in get_args(hint) for kind in _kinds(part)}
    if get_origin(hint) is Literal:
        return {type(value) for value in get_args(hint)}
    return {get_origin(hint) or hint}


def _as_the_field_takes_it(name: str, value: Any, kinds: set[Any]) -> Any:
    """Returns a value of a YAML file as the field takes it. A text is left to the parser, which reads it as on the command line.

    Raises:
        ValueError: for a value of another type, such as the false that YAML makes of `no` without quotes.
    """
    valid = {kind for kind in kinds if kind in WORDS}
    if name in OFF:
        _check_off(name, value)
    if isinstance(value, dict) and dict in kinds:
        return {key: _number(item) for key, item in value.items()}
    if valid == {list} and isinstance(value, str | int | float):
        return [value]  # as the command line's --name value
    if isinstance(value, str) or type(value) in kinds or not valid:
        return value
    if type(value) is int and float in kinds:
        return value
    if type(value) is float and int in kinds and value.is_integer():
        return int(value)
    if type(value) is int and bool in kinds and value in (0, 1):
        return bool(value)
    if value is None:
        raise ValueError(f"{name} has no value. Give one, or leave the line out.")
    expected = " or ".join(word for kind, word in WORDS.items() if kind in valid)
    found = "a fraction" if isinstance(value, float) and int in kinds else WORDS.get(type(value), "a date")
    remedy = ""
    if str in kinds and isinstance(value, bool):
        word = "yes" if value else "no"
        remedy = f" YAML reads {word} without quotes as {str(value).lower()}: write {name}: '{word}', or leave the line out."
    elif valid == {str} and not isinstance(value, list | dict):
        remedy = f" Write it in quotes: {name}: '{value}'."
    raise ValueError(f"{name}={shown(value)}: expected {expected}, not {found}.{remedy}")


def _check_off(name: str, value: Any) -> None:
    """Raises a `ValueError` for `none` where leaving out is not turning off."""
    if value is None or str(value).lower() in ("none", "null"):
        raise ValueError(
            f"{name}={value}: write {OFF[name]} to turn it off; left out, it stays as the checkpoint has it."
        )


def _off_by_its_value(name: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """The `type` of a field in `OFF`."""

    def parse(text: str) -> Any:
        try:
            _check_off(name, text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error
        return read(text)

    parse.__name__ = getattr(read, "__name__", "value")
    return parse


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


class _FieldParser(TrlParser):
    """`TrlParser` that takes no abbreviations, and checks all names before it makes the dataclasses, which may miss the mistyped one."""

    def __init__(self, dataclasses: Iterable[type], also: Iterable[str] = ()):
        super().__init__(dataclasses)
        given = [field for dataclass in dataclasses for field in fields(dataclass)]
        self.names = [field.name for field in given]
        self.kinds = {
            name: _kinds(kind) for dataclass in dataclasses for name, kind in get_type_hints(dataclass).items()
        }
        for field in given:
            self.kinds[field.name] |= {type(None)} if field.default is None else set()
            self.kinds[field.name] |= {bool} if field.name in ALSO_TRUE else set()
        switches = [f"no_{field.name}" for field in given if field.default is True]
        self.options = [*self.names, *switches, *also, "config", "help"]
        self.config = None
        for action in self._actions:
            if action.dest in OFF:
                action.type = _off_by_its_value(action.dest, action.type)

    def parse_args_and_config(self, args: Iterable[str], **options) -> tuple:
        args = [part for item in args for part in (item.split("=", 1) if item.startswith("--config=") else [item])]
        if "--config" in args:
            self.config = "".join(args[args.index("--config") + 1 :][:1])
            if not Path(self.config).is_file():
                raise SystemExit(f"error: --config needs a YAML file; there is no file {self.config!r}.")
            read_yaml(Path(self.config))
        try:
            return super().parse_args_and_config(args, **options)
        except (ValueError, ImportError) as error:  # of ours, TRL's and transformers' checks of values alike
            raise ValueError(str(error)) from error

    def error(self, message: str) -> None:
        raise SystemExit(f"error: {message}")  # without the usage, which has hundreds of lines

    def set_defaults_with_config(self, **values) -> list[str]:
        for name in values:
            if name not in self.names:
                raise SystemExit(f"error: {self.config}: there is no field {name!r}.{_hint(name, self.names)}")
        try:
            values = {name: _as_the_field_takes_it(name, value, self.kinds[name]) for name, value in values.items()}
        except ValueError as error:
            raise SystemExit(f"error: {self.config}: {error}") from error
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
    """As `hint`; the new name of a field that was renamed, and of one of the checkpoint's configuration the program that sets it."""
    field = name.removeprefix("--").replace("-", "_")
    if field in AlignVLMConfig.__annotations__:
        return f" {name} is an option of `alignvlm assemble`, which makes the checkpoint that stages start from."
    if renamed := RENAMED.get(field):
        return f" Its name is {'--' if name.startswith('--') else ''}{renamed} now."
    return hint(name, valid)
