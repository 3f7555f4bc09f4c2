"""A file streamed to disk has the bytes that were appended, whatever the file system can."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import threading

import numpy as np
import pytest

from mistral_prune_lora.storage import streamed_file
from mistral_prune_lora.storage.streamed_file import StreamedFile

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


SIZES = [0, 1, 4095, 4096, 4097, BUFFER - 1, BUFFER, BUFFER + 1, 5 * BUFFER + 12345]


@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_are_those_that_were_appended(size, file_system, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed_file, "_SYNC_EVERY", 2 * BUFFER)
    content = random.Random(size).randbytes(size)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("size", [*SIZES, 17 * BUFFER + 4095])
def test_what_comes_back_is_what_was_written_all_of_it_and_in_order(size, file_system, tmp_path):
    """More than the buffers hold that are kept until they have come back."""
    content, came_back = random.Random(size).randbytes(size), bytearray()

    def compare(written, read):
        assert written.tobytes() == read.tobytes()
        assert not np.shares_memory(written, read)
        came_back.extend(memoryview(read))

    write(tmp_path / "file", content, compare)
    assert came_back == content
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("at", [0, BUFFER - 1, 3 * BUFFER + 777, 9 * BUFFER + 100])
def test_what_changed_on_the_disk_is_seen(at, file_system, tmp_path, monkeypatch):
    """Also without direct reads: what the page cache has of the writer's bytes is dropped before."""
    pwrite, path, seen = os.pwrite, tmp_path / "file", []

    def spoiling(descriptor, data, offset):
        done = pwrite(descriptor, data, offset)
        if offset <= at < offset + done:
            with open(path, "r+b", buffering=0) as other:
                other.seek(at)
                other.write(b"X")
                os.fsync(other.fileno())
        return done

    def compare(written, read):
        seen.extend(np.flatnonzero(written != read).tolist())

    monkeypatch.setattr(os, "pwrite", spoiling)
    write(path, bytes(9 * BUFFER + 101), compare)
    assert seen == [at % BUFFER]


def in_page_cache(descriptor: int, offset: int) -> bool:
    """Whether a read would be served from memory, without waiting for the device."""
    try:
        os.preadv(descriptor, [bytearray(4096)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def test_without_direct_reads_nothing_is_left_in_the_page_cache_when_it_is_read(tmp_path, monkeypatch):
    with open(tmp_path / "other", "w+b", buffering=0) as other:
        other.write(bytes(BUFFER))
        os.fsync(other.fileno())
        os.posix_fadvise(other.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if in_page_cache(other.fileno(), 0):
            pytest.skip("on this file system, memory is all there is")
    preadv, found = os.preadv, []

    def looking(descriptor, buffers, offset):
        monkeypatch.setattr(os, "preadv", preadv)
        found.append(in_page_cache(descriptor, offset))
        monkeypatch.setattr(os, "preadv", looking)
        return preadv(descriptor, buffers, offset)

    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setattr(os, "preadv", looking)
    write(tmp_path / "file", bytes(13 * BUFFER + 5000), lambda written, read: None)
    assert len(found) >= 14
    assert not any(found)


def test_what_the_comparison_raises_ends_the_writing(file_system, tmp_path):
    def compare(written, read):
        raise ArithmeticError("not the same")

    before = threading.active_count()
    for size in (1, 40 * BUFFER):
        with pytest.raises(ArithmeticError, match="not the same"):
            write(tmp_path / "file", bytes(size), compare)
    assert threading.active_count() == before


def test_a_disk_that_cannot_be_read_ends_the_writing(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    for size in (1, 40 * BUFFER):
        with pytest.raises(OSError, match="Input/output error"):
            write(tmp_path / "file", bytes(size), lambda written, read: None)


def test_a_full_disk_ends_the_reading_too(file_system, tmp_path, monkeypatch):
    pwrite = os.pwrite

    def full(descriptor, data, offset):
        if offset >= 5 * BUFFER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", bytes(40 * BUFFER), lambda written, read: None)
    assert threading.active_count() == before


def write(path, content: bytes, compare=None) -> None:
    """In pieces of all sizes, in memory that is used for every piece, as the merge does."""
    rest, pieces = memoryview(content), random.Random(0)
    with StreamedFile(path, compare) as file:
        while len(rest):
            count = pieces.choice([1, 7, 4096, 100_000, 3_000_000])
            piece = bytearray(rest[:count])
            file.append(memoryview(piece))
            piece[:] = bytes(len(piece))
            rest = rest[count:]
        file.finish()


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
