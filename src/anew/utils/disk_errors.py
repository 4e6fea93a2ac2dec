"""Errors of disks: those that may pass, after which an operation is tried again, and full disks.

    with_retries(lambda: write_json(path, content, format), path)

On a network file system (NFS, Lustre) or a mounted object store, an operation can fail while a
server restarts or a connection is lost, and succeed some seconds later. Other errors, such as a
missing permission, a missing file or a full disk, do not pass by waiting.
"""

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger("anew")

Result = TypeVar("Result")

# The seconds before the second, third, ... attempt: five attempts, the last one after 58 seconds.
PAUSES = (2.0, 6.0, 15.0, 35.0)

# FUSE and Lustre report a lost server as ENOTCONN and ESHUTDOWN.
TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.EINTR,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
}


def is_transient(error: OSError) -> bool:
    """Return whether an error may pass by waiting."""
    return error.errno in TRANSIENT


def with_retries(operation: Callable[[], Result], path: Path) -> Result:
    """Call `operation`, which uses `path`, again after each error that may pass.

    It must give the same result however often it was begun. An operation that writes must write the
    whole content again: after fsync has failed, Linux may drop what was not yet on the disk, and
    the next fsync of the same file then succeeds without it.

    Each error is logged as a warning. The error of the last attempt, or one that does not pass, is
    raised; its `filename` is `path` unless it names a file itself.
    """
    attempts = len(PAUSES) + 1
    for attempt, pause in enumerate(PAUSES, start=1):
        try:
            return _with_filename(operation, path)
        except OSError as error:
            if not is_transient(error):
                raise
            log.warning(
                f"{path}: {os.strerror(error.errno or 0)} (attempt {attempt} of {attempts}); "
                f"the next attempt follows in {pause:g} s"
            )
        time.sleep(pause)
    return _with_filename(operation, path)


def _with_filename(operation: Callable[[], Result], path: Path) -> Result:
    """Call `operation`; an error that names no file gets `path` as its `filename`."""
    try:
        return operation()
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def is_disk_full(error: OSError) -> bool:
    """Return whether a disk is full or a quota used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def out_of_space(error: OSError, folder: Path) -> str:
    """Return the first half of a sentence if a disk or a quota is full; "" for other errors."""
    if error.errno == errno.ENOSPC:
        return f"the disk of {folder} is full"
    if error.errno == errno.EDQUOT:
        return f"your disk quota for {folder} is used up"
    return ""
