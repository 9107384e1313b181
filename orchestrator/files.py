"""Files that readers see whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """Write a file through a neighbour, so that a writer that is killed leaves the old one; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    staging.write_bytes(content)
    staging.replace(file)
