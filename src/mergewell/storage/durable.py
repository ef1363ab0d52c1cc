"""Writing so that a power cut leaves the old or the new, never a part.

The order is always: contents, fsync of the file, rename, fsync of the folder. Without the first
fsync a file system may make the new name durable before the contents; without the second the
rename itself may be lost.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mergewell.errors import OutputError


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn a failure of the system while `path` is written into an `OutputError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space" if full else "check the disk and the permissions"
        raise OutputError(
            f"{path} could not be written ({error.strerror or error}); {remedy} and run again."
        ) from error


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` under `path`, replacing what is there: all of it or nothing.

    Raises:
        OutputError: the system refuses; `path` is as it was.
    """
    # Not the process's number: on a shared disk two machines may have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        try:
            write_synced(temporary, content)
            os.replace(temporary, path)  # noqa: PTH105 - injected failures patch `os`
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk; OSError passes through."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        pwrite_all(descriptor, memoryview(content), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pwrite_all(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes at `offset`: the system may take fewer than it was given."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        if written == 0:
            raise OSError(errno.EIO, "the system wrote no byte")
        content, offset = content[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
