"""Texts are read and written as UTF-8, whatever encoding the system prefers (Windows and old clusters prefer another)."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.test_layout import ROOT


TEXT = "Ein Bär am Fluß 河"
ROWS = {
    "rows.jsonl": json.dumps({"image": "a.png", "text": TEXT}, ensure_ascii=False) + "\n",
    "rows.json": json.dumps([{"image": "a.png", "text": TEXT}], ensure_ascii=False),
    "rows.csv": f"image,text\na.png,{TEXT}\n",
    "rows.txt": TEXT + "\n",
}
SCRIPT = """
import locale, sys
from pathlib import Path
from alignvlm.data.sources import read_source
from hub_upload.run_record import read_json, write_json
assert locale.getpreferredencoding(False) != "UTF-8"
write_json(Path("record.json"), {"text": sys.argv[1].encode().decode("unicode_escape")})
found = [read_json(Path("record.json"))["text"]]
for file in sys.argv[2:]:
    source = {"data": file, **({"name": "text"} if file.endswith("txt") else {})}
    for rows in ([read_source(source)[0]], read_source(source, streaming=True).rows):
        found += [response for row in rows for each in row["conversations"] for response in each["responses"]]
print(ascii(found))
"""


@pytest.mark.slow
def test_texts_are_utf8_where_the_system_prefers_ascii(tmp_path):
    for name, content in ROWS.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    system = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, ascii(TEXT)[1:-1], *ROWS]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **system}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ascii([TEXT] * (1 + 2 * len(ROWS)))
