"""The only place that creates, syncs, renames and deletes what a checkpoint is made of.

Order is everything here: a file's bytes are durable after `fsync` of the file, its name after `fsync` of the
directory. `rename` is atomic, and so is `exchange`; `exchange` is Linux's `renameat2(RENAME_EXCHANGE)`.
"""

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forgather_ckpt import paths
from forgather_ckpt.errors import NoSpace, StorageError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2
_RENAME_EXCHANGE = 2
_NUM_DELETIONS = 5
_AT_FDCWD = -100


@contextmanager
def typed_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` (or `NoSpace`) that says what was being done to what."""
    try:
        yield
    except OSError as err:
        where = err.filename if isinstance(err.filename, str) else str(path)
        if err.errno in _NO_ROOM:
            raise NoSpace(f"{doing} failed at {where}: {err.strerror}; {_free_space(path)}", path=where) from err
        raise StorageError(f"{doing} failed at {where}: {err.strerror or err}", path=where) from err


def _free_space(path: Path) -> str:
    try:
        return f"{free_bytes(path)} bytes are free there"
    except OSError:
        return "free space unknown"


def not_shared(directory: Path) -> StorageError:
    """The error of a rank that does not see the directory that rank 0 has made."""
    return StorageError(
        f"rank 0 made {directory}, which is not visible here: the run directory must be on a file system that all nodes "
        "share",
        path=str(directory),
    )


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged process may still write to the file system of `path` (or its nearest parent)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def create(path: Path, size: int, *, mode: int = 0o666) -> int:
    """Create a file of `size` reserved bytes that must not exist yet; the caller owns the descriptor.

    `O_EXCL | O_NOFOLLOW`: a file or symlink that somebody planted there is an error, not a target.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        if size:
            _reserve(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _reserve(descriptor: int, size: int) -> None:
    """Take the blocks now, so that a full disk is found before the work, where the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as err:
        if err.errno not in _UNSUPPORTED:
            raise
        os.ftruncate(descriptor, size)


def write_at(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data`; the kernel may take it in several parts."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Have the kernel begin to write these pages to the device, so that `fsync` finds little left to do. A hint."""
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def write_new(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a small file durably: its bytes are on disk when this returns, its name after the directory's sync."""
    descriptor = create(path, len(data), mode=mode)
    try:
        write_at(descriptor, data, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a small file durably in place of the one that may be there: at every instant one of the two is found.

    `mode`: who may read and write it, less what the umask takes away.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        write_new(temporary, data, mode=mode)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its parents durably: every parent that gained an entry is synced."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one atomic step; False where the kernel or file system cannot (NFS, FUSE, macOS)."""
    if not hasattr(_libc, "renameat2"):
        return False
    code = _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one))


def discard(path: Path, nonce: str) -> None:
    """Remove a directory in the reverse order of a commit: rename it away, sync the parent, then delete.

    A draft is renamed too: a rank that is still writing cannot add a file to what is being deleted.
    """
    delete(set_aside(path, nonce))


def set_aside(path: Path, nonce: str) -> Path:
    """The first half of `discard`, which takes no time: what was a checkpoint is trash now; where it is."""
    away = path
    if not path.name.startswith(paths.TRASH_PREFIX):
        away = path.with_name(paths.trash(path.name, nonce))
        os.rename(path, away)
        if not paths.is_temporary(path.name):
            sync_directory(path.parent)
    return away


def delete(path: Path) -> None:
    """Delete what is there, whatever it is; nothing there is fine, and symlinks are not followed."""
    for attempt in range(_NUM_DELETIONS):
        try:
            is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
            shutil.rmtree(path) if is_directory else os.unlink(path)
        except FileNotFoundError:
            return
        except OSError as err:
            # A rank that was just creating a file when the draft was renamed away put it there after all.
            if err.errno != errno.ENOTEMPTY or attempt == _NUM_DELETIONS - 1:
                raise
        else:
            return


def regular_size(path: Path) -> int | None:
    """The size of a regular file; None where there is none (a symlink is none)."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def open_to_read(path: Path) -> int:
    """Open a data file for reading; a symlink or anything but a regular file is an `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; fewer bytes only at the end of the file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
