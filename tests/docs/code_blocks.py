"""The code blocks of a Markdown page, in order, each with its language and what the comment before it says.

`<!-- not run: REASON -->` right before a block keeps it from being run; its commands are still given to their argument parsers.
"""

import re
from dataclasses import dataclass
from pathlib import Path


COMMANDS = ("accelerate", "alignvlm", "make", "pip", "pytest", "python")
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
    r"(?:^(?P<fence>`{3,})(?P<language>[^\n]*)\n(?P<fenced>.*?)^(?P=fence)$"
    r"|(?<=\n\n)(?P<indented>(?: {4}[^\n]*\n|\n(?= {4}))+))",
    flags=re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    """A code block: `reason` says why it is not run, None if it is; `place` is `page.md:line`."""

    language: str
    code: str
    place: str
    reason: str | None = None

    @property
    def file(self) -> str | None:
        """The name of the file that the block shows, which its first line says, or the one after `#!`: `# name.yaml`."""
        found = re.match(r"(?:#!.*\n)?# ([\w./-]+\.(?:yaml|json|jsonl|py|sh))\n", self.code)
        return found[1] if found else None


def blocks_of(page: Path) -> list[Block]:
    """All code blocks of a page. An indented one has no language: it is a shell's if it begins with a command, otherwise text."""
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        start = match.start("fence" if match["fence"] else "indented")
        place = f"{page.name}:{text.count(chr(10), 0, start) + 1}"
        if match["fence"]:
            found.append(Block(match["language"], match["fenced"], place, match["reason"]))
            continue
        code = re.sub(r"^ {4}", "", match["indented"], flags=re.MULTILINE)
        (first, *_) = [line.split()[0] for line in code.splitlines() if line.strip() and not line.startswith("#")]
        language = "bash" if first in COMMANDS else "text"
        found.append(Block(language, code, place, match["reason"] or "an indented block has no place for a language"))
    return found
