"""A file streamed to disk has the bytes that were appended, whatever the file system can."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading

import pytest

from mistral_prune_lora import streamed_file
from mistral_prune_lora.streamed_file import StreamedFile

BUFFER = streamed_file._BUFFER_BYTES


@pytest.fixture(params=["direct", "refused at opening", "refused at writing", "no such flag"])
def file_system(request, monkeypatch):
    """What the file system makes of direct writes."""
    if request.param == "refused at opening":
        monkeypatch.setattr(os, "open", refusing(os.open))
    elif request.param == "refused at writing":
        monkeypatch.setattr(os, "pwrite", refusing_unaligned(os.pwrite))
    elif request.param == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT")
    return request.param


def refusing(opening):
    def opened(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct writes here")
        return opening(path, flags, mode)

    return opened


def refusing_unaligned(pwrite):
    def written(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "larger blocks here")
        return pwrite(descriptor, data, offset)

    return written


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, BUFFER - 1, BUFFER, BUFFER + 1, 5 * BUFFER + 12345])
def test_the_bytes_are_those_that_were_appended(size, file_system, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_file, "_SYNC_EVERY", 2 * BUFFER)
    content = random.Random(size).randbytes(size)
    rest, pieces = memoryview(content), random.Random(0)
    with StreamedFile(tmp_path / "file") as file:
        while len(rest):
            count = pieces.choice([1, 7, 4096, 100_000, 3_000_000])
            # The same memory is used for every piece, as the merge does.
            piece = bytearray(rest[:count])
            file.append(memoryview(piece))
            piece[:] = bytes(len(piece))
            rest = rest[count:]
        file.finish()
    assert (tmp_path / "file").read_bytes() == content


def test_a_longer_file_of_the_same_name_is_overwritten(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10_000))
    with StreamedFile(tmp_path / "file") as file:
        file.append(memoryview(b"short"))
        file.finish()
    assert (tmp_path / "file").read_bytes() == b"short"


def test_a_full_disk_is_told_and_ends_the_thread(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"), StreamedFile(tmp_path / "file") as file:
        for _ in range(100):
            file.append(memoryview(bytes(BUFFER)))
    with pytest.raises(OSError, match="No space left"), StreamedFile(tmp_path / "file") as file:
        file.append(memoryview(b"short"))
        file.finish()
    assert threading.active_count() == before


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        StreamedFile(tmp_path / "missing/file")
