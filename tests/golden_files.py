"""Golden files: what the format looked like when it was last changed on purpose.

`REWRITE_GOLDEN=1 pytest tests/test_manifest.py` writes them anew; the change is then seen in review.
"""

import os
from pathlib import Path

DIRECTORY = Path(__file__).parent / "golden"


def golden(name: str, data: bytes) -> bytes:
    """The golden bytes to compare `data` with; with REWRITE_GOLDEN set they become `data`."""
    path = DIRECTORY / name
    if os.environ.get("REWRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return path.read_bytes()
