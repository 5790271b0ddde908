"""One command asks a checkpoint on all tasks whose data are at hand."""

import json

import pytest

from benchmarks import all_tasks
from docs.write_results_page import blocks


@pytest.mark.slow
def test_all_tasks_are_asked_with_all_controls(shared_data, checkpoint, tmp_path, monkeypatch):
    words = [str(checkpoint), "--data", str(shared_data), "--output", str(tmp_path), "--limit", "2"]
    monkeypatch.setattr("sys.argv", ["all_tasks.py", *words])
    all_tasks.main()
    found = json.loads((tmp_path / "results.json").read_text())["all_tasks"]
    rows = [line.split("|")[1:] for line in found["tables"]["stage0"].splitlines()[2:]]
    assert {row[0].strip() for row in rows} == {*all_tasks.SETS, "wikitext2"}
    cider = next(row for row in rows if row[1].strip() == "cider")
    assert all(cell.strip() != "-" for cell in cider)  # the value, every control, and what needs the image
    assert "`stage0`:\n\n| task" in blocks({"all_tasks": found})["all tasks"]
    asked = json.loads((tmp_path / "stage0/daquar.json").read_text())
    held = (tmp_path / "data/photos/daquar/test.jsonl").read_text()
    assert asked["data"]["images"] == 2 and all(item["prompt"] in held for item in asked["predictions"])
