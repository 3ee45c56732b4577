"""What the preloader does with orders, in this process: nothing is forked here."""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from pathlib import Path

import pytest
from distrib_launcher import preloader


class Exited(Exception):
    pass


def descriptors() -> set[str]:
    return {x.name for x in Path("/proc/self/fd").iterdir()}


def test_a_store_whose_fork_is_refused_is_answered_and_nothing_stays_open(monkeypatch):
    def refuse():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    def leave(code):
        raise Exited(code)

    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr(os, "_exit", leave)
    launcher, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with launcher, channel, socket.create_server(("127.0.0.1", 0)) as listening:
        before = descriptors()
        for number in range(2):
            own = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
            first = [listening.fileno(), os.dup(own[0])] if number == 0 else []
            order = {
                "others": 1,
                "listening": number == 0,
                "env": {},
                "stdin": False,
                "launcher": os.getpid(),
            }
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", first + own))
            launcher.sendmsg([json.dumps(order).encode()], [rights])
            for fd in (*first[1:], *own):
                os.close(fd)
        launcher.shutdown(socket.SHUT_WR)
        with pytest.raises(Exited):
            preloader._serve(channel)
        answer = json.loads(launcher.recv(2**16))
        assert descriptors() == before
    assert answer == {"pids": [], "errno": errno.EAGAIN, "store": 0}
