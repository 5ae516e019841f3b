"""Output that cannot be written is dropped, and the program goes on."""

import errno
import io
import os
import sys

import pytest

from cifar.output import safe_output


def broken_pipe():
    """Return a text stream to a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def test_closed_pipe_takes_what_is_written_and_is_flushed_at_exit(monkeypatch):
    stream = broken_pipe()
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_output():
        for _ in range(3):
            print("x" * 100_000, flush=True)
        sys.stdout.flush()
    assert sys.stdout is stream
    stream.write("more")
    stream.close()  # as Python does at exit: no BrokenPipeError, no status 120


def test_output_still_buffered_at_the_end_is_dropped(monkeypatch):
    stream = broken_pipe()
    monkeypatch.setattr(sys, "stderr", stream)
    with safe_output():
        print("buffered", file=sys.stderr)
    stream.close()


class FullDisk(io.StringIO):
    """A stream that has no room for a while."""

    full = True

    def write(self, text):
        if self.full:
            raise OSError(errno.ENOSPC, "no space")
        return super().write(text)


def test_output_returns_once_a_full_disk_has_room(monkeypatch):
    stream = FullDisk()
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_output():
        print("lost")
        FullDisk.full = False
        print("seen")
    assert stream.getvalue() == "seen\n"


@pytest.mark.parametrize("stream", [None, "closed"])
def test_no_stream_at_all(monkeypatch, stream):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    with safe_output():
        print("anyone?")
        sys.stdout.flush()
    assert sys.stdout is stream


def test_characters_that_the_encoding_lacks_are_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with safe_output():
        print("für")
    assert raw.getvalue() == b"f\\xfcr\n"


def test_other_errors_are_raised():
    with pytest.raises(BrokenPipeError), safe_output():
        raise BrokenPipeError  # not of the output: gloo's, say
