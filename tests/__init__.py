"""The tests mirror the folders of the package."""

import os


def examples(count: int) -> int:
    """How many random examples a property test tries: `count`, or many times as many under `make test-full`."""
    return count * int(os.environ.get("ALIGNVLM_TEST_EXAMPLES", "1"))
