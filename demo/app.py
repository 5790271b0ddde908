"""The Space's app: the demo of the checkpoint that ALIGNVLM_MODEL names, or the `models` of README.md; the second is compared.

Elsewhere: `alignvlm demo CHECKPOINT`.
"""

import os
from pathlib import Path

import yaml

from alignvlm.tools.demo import main


def checkpoints() -> list[str]:
    """The names of one or two checkpoints.

    Raises:
        SystemExit: if neither the environment nor README.md names one.
    """
    named = os.environ.get("ALIGNVLM_MODEL", "").split()
    if not named:
        metadata = (Path(__file__).parent / "README.md").read_text(encoding="utf-8").split("---")[1]
        named = yaml.safe_load(metadata).get("models") or []
    if not named:
        raise SystemExit("error: set ALIGNVLM_MODEL to the repository of a checkpoint, user/name.")
    return named[:2]


if __name__ == "__main__":
    first, *others = checkpoints()
    main([first, *(["--compare", others[0]] if others else [])])
