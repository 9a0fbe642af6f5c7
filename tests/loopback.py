"""Forbids every connection and look-up beyond this machine, in the process that calls it."""

from __future__ import annotations

import socket

HERE = ("127.0.0.1", "::1", "localhost", None)


class LeftTheMachine(BaseException):
    """Not an Exception, so that no retry and no fallback hides it."""


def forbid(set_attribute=setattr) -> None:
    """`set_attribute`: pytest's `monkeypatch.setattr` undoes it after a test."""

    def guarded(real):
        def connect(self, address):
            if self.family != socket.AF_UNIX and address[0] not in HERE:
                raise LeftTheMachine(f"a connection to {address}")
            return real(self, address)

        return connect

    def look_up(host, *rest, **more):
        if host not in HERE:
            raise LeftTheMachine(f"a look-up of {host}")
        return real_look_up(host, *rest, **more)

    real_look_up = socket.getaddrinfo
    set_attribute(socket.socket, "connect", guarded(socket.socket.connect))
    set_attribute(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    set_attribute(socket, "getaddrinfo", look_up)
