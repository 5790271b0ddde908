"""Prints, as pip constraints, the lowest release of every library that pyproject.toml claims."""

import re
from pathlib import Path

import tomllib


project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
# Extras that no test imports (`bench`, `demo`, `lmms`) are not installed with the lowest releases.
extras = project["optional-dependencies"]
for requirement in sorted(
    {*project["dependencies"], *extras["export"], *extras["lora"], *extras["serving"], *extras["test"]}
):
    if found := re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement):
        print(f"{found[1]}=={found[2]}")
