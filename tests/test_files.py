"""The one place that touches the file system: what is planted is refused, what fails is a typed error."""

import errno
import os
import stat

import pytest

from forgather_ckpt import files, paths
from forgather_ckpt.errors import NoSpace, StorageError
from tests.checkpoints import tree
from tests.system_calls import num_open_files


@pytest.fixture(params=[0o007, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_the_umask_decides_who_may_read(tmp_path, umask):
    files.write_new(tmp_path / "file", b"x")
    files.make_directory(tmp_path / "a" / "b")
    assert mode(tmp_path / "file") == 0o666 & ~umask
    assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o777 & ~umask


# ---- creating and writing


def test_a_file_is_written_whole_and_synced_before_it_is_closed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    files.write_new(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert synced == [7]


def test_the_kernel_may_take_a_write_in_parts(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    files.write_new(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_the_space_of_a_file_is_reserved_before_it_is_written(tmp_path):
    descriptor = files.create(tmp_path / "file", 1 << 20)
    try:
        status = os.fstat(descriptor)
        assert status.st_size == 1 << 20
        assert status.st_blocks * 512 >= 1 << 20
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_where_space_cannot_be_reserved_it_goes_without(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    files.write_new(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_full_disk_is_found_when_space_is_reserved(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    open_before = num_open_files()
    with (
        pytest.raises(NoSpace, match=r"writing failed at .*No space left on device; [0-9]+ bytes are free there"),
        files.typed_errors(tmp_path, "writing"),
    ):
        files.create(tmp_path / "file", 10)
    assert num_open_files() == open_before


def plant_file(path):
    path.write_bytes(b"planted")


def plant_link(path):
    (path.parent / "elsewhere").write_bytes(b"precious")
    path.symlink_to(path.parent / "elsewhere")


def plant_dangling_link(path):
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("plant", [plant_file, plant_link, plant_dangling_link, os.mkdir, os.mkfifo])
def test_what_is_in_the_way_is_an_error_and_stays_as_it_is(tmp_path, plant):
    def seen():
        status = os.lstat(tmp_path / "file")  # when it was last read is nobody's doing here
        content = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, content

    plant(tmp_path / "file")
    before = seen()
    with pytest.raises(OSError, match="File exists"):
        files.write_new(tmp_path / "file", b"x")
    assert seen() == before


# ---- reading


def test_reading_fills_the_buffer_or_says_how_much_there_was(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    descriptor = files.open_to_read(tmp_path / "file")
    try:
        buffer = bytearray(4)
        assert files.read_at(descriptor, memoryview(buffer), 3) == 4
        assert buffer == b"3456"
        assert files.read_at(descriptor, memoryview(buffer), 8) == 2
        assert files.read_at(descriptor, memoryview(buffer), 20) == 0
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("plant", [plant_link, plant_dangling_link, os.mkdir, os.mkfifo])
def test_only_regular_files_are_read(tmp_path, plant):
    plant(tmp_path / "file")
    open_before = num_open_files()
    with pytest.raises(OSError):
        files.open_to_read(tmp_path / "file")
    assert files.regular_size(tmp_path / "file") is None
    assert num_open_files() == open_before


def test_the_size_of_a_regular_file(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert files.regular_size(tmp_path / "file") == 5
    assert files.regular_size(tmp_path / "nothing") is None
    assert files.regular_size(tmp_path / "file" / "below") is None


# ---- directories


def test_every_parent_that_gains_an_entry_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_directory", synced.append)
    files.make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    files.make_directory(tmp_path / "a" / "b")
    assert len(synced) == 3


def test_two_directories_are_exchanged_in_one_step(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert files.exchange(tmp_path / "one", tmp_path / "other")
    assert tree(tmp_path) == {"one": None, "one/other": b"", "other": None, "other/one": b""}


def test_an_exchange_with_nothing_is_an_error(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "one", tmp_path / "other")
    assert tree(tmp_path) == {"one": None}


class Refusing:
    """A C library without `renameat2`, or one whose file system does not know it."""

    def __init__(self, number: int | None) -> None:
        if number is not None:
            self.number = number
            self.renameat2 = self._refuse

    def _refuse(self, *_):
        files.ctypes.set_errno(self.number)
        return -1


@pytest.mark.parametrize("number", [None, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_where_there_is_no_exchange_it_says_so(tmp_path, monkeypatch, number):
    monkeypatch.setattr(files, "_libc", Refusing(number))
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    assert files.exchange(tmp_path / "one", tmp_path / "other") is False


def test_an_exchange_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_libc", Refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        files.exchange(tmp_path / "one", tmp_path / "other")


# ---- removing


@pytest.mark.parametrize("name", ["checkpoint-5", ".tmp-checkpoint-5-ab", ".trash-checkpoint-5-ab"])
def test_what_is_discarded_is_gone(tmp_path, name):
    (tmp_path / name / "below").mkdir(parents=True)
    (tmp_path / name / "below" / "file").touch()
    files.discard(tmp_path / name, "cd")
    assert tree(tmp_path) == {}


def test_a_checkpoint_is_renamed_durably_before_it_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-5").mkdir()
    seen = []
    monkeypatch.setattr(
        files, "sync_directory", lambda path: seen.append(("sync", path, sorted(one.name for one in path.iterdir())))
    )
    monkeypatch.setattr(files, "delete", lambda path: seen.append(("delete", path)))
    files.discard(tmp_path / "checkpoint-5", "ab")
    away = paths.trash("checkpoint-5", "ab")
    assert seen == [("sync", tmp_path, [away]), ("delete", tmp_path / away)]


def test_symlinks_are_deleted_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "link").symlink_to("../precious")
    files.delete(tmp_path / "link")
    files.delete(tmp_path / "directory")
    assert tree(tmp_path) == {"precious": None, "precious/file": b""}


def test_nothing_to_delete_is_fine(tmp_path):
    files.delete(tmp_path / "nothing")


# ---- errors


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EFBIG, NoSpace),
        (errno.EIO, StorageError),
        (errno.EACCES, StorageError),
        (errno.EROFS, StorageError),
    ],
)
def test_what_the_system_refuses_is_a_typed_error(tmp_path, number, kind):
    where = str(tmp_path / "file")
    with pytest.raises(StorageError) as caught, files.typed_errors(tmp_path, "writing the checkpoint"):
        raise OSError(number, os.strerror(number), where)
    assert type(caught.value) is kind
    assert caught.value.message.startswith(f"writing the checkpoint failed at {where}: {os.strerror(number)}")
    assert caught.value.path == where
    assert isinstance(caught.value.__cause__, OSError)


def test_what_is_no_matter_of_the_system_passes(tmp_path):
    with pytest.raises(ZeroDivisionError), files.typed_errors(tmp_path, "writing"):
        raise ZeroDivisionError


def test_free_space_is_that_of_the_nearest_parent(tmp_path):
    status = os.statvfs(tmp_path)
    free = files.free_bytes(tmp_path / "not" / "yet" / "there")
    assert abs(free - status.f_bavail * status.f_frsize) < 1 << 34
    assert free > 0
