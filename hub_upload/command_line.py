"""The command lines of `hub_upload` and of `alignvlm`: a mistyped option is refused with the nearest valid one."""

import argparse
import difflib
import sys
from collections.abc import Iterable


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


def hint(name: str, valid: Iterable[str]) -> str:
    """Which of the valid names was meant, as the end of an error message."""
    words = name.lstrip("-").replace("-", "_")
    nearest = difflib.get_close_matches(f"--{words}" if name.startswith("-") else words, valid, 1)
    return f" Did you mean {nearest[0]}?" if nearest else " --help lists them all."
