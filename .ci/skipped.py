#!/usr/bin/env python3
"""Says in one line how many tests `pytest -rs`, whose output it reads, has skipped, and why."""

import re
import sys
from collections import Counter


reasons = Counter()
for line in sys.stdin:
    if found := re.match(r"SKIPPED \[(\d+)\] \S+: (?:Skipped: )?(.*)", line):
        reasons[found[2]] += int(found[1])
told = "; ".join(f"{count} ({reason})" for reason, count in reasons.most_common())
print(f"Tests skipped: {reasons.total()}: {told}." if reasons else "No test was skipped.")
