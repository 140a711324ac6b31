"""Folders for what several tests share."""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path


def shared_folder() -> Path:
    """A new folder that is there until the process ends."""
    made = tempfile.TemporaryDirectory(prefix="graphopt-tests-")
    atexit.register(made.cleanup)
    return Path(made.name)
