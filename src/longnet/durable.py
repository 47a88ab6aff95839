"""What the disk holds to stay, whatever happens to the machine."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or the names in a folder, a rename among them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
