"""Files and folders that readers see whole or not at all."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multilora.errors import RequestError


def write_whole(file: Path, content: bytes) -> None:
    """Write a file through a neighbour, so that a writer that is killed leaves the old one; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    staging.write_bytes(content)
    staging.replace(file)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give the path of a folder to make and fill, which becomes `folder` at the end, or vanishes where filling it fails.

    Raises RequestError where something is there already; an empty folder may be.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RequestError(f"{folder} is there already and not an empty folder; name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as parent:
        staging = Path(parent) / folder.name  # `parent` itself only its owner may read
        yield staging
        staging.replace(folder)
