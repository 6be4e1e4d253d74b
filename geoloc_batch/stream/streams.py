"""Streams: the output of a `pipe:` command, a file that is read front to back. For http(s) see download.

They raise OSError when the transport fails, also where what came over looked whole: a command that ends with an error,
a connection that closed before the length the server had promised. An Interrupt ends each wait.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from typing import Protocol

from geoloc_batch.stream.backoff import Backoff
from geoloc_batch.stream.interrupt import POLL_S, Interrupt

COMMAND_TRIES = 3
"""How often a command is run that fails before it gave anything."""
COMMAND_STALL_TIMEOUT_S = 600.0
"""A command that writes nothing for this long is given up. It may have to fetch what it writes from a slow archive."""

# What sh says of a command that it cannot run, or does not find.
_NO_COMMAND = frozenset({126, 127})


class ByteStream(Protocol):
    """What a StreamSource reads from."""

    num_bytes: int | None
    """Length where the sender told it, None otherwise."""
    is_remote: bool
    """Whether a missing end may be the transport's fault."""

    @property
    def warnings(self) -> list[str]:
        """What was odd about the transport so far."""
        ...

    def read(self, size: int) -> bytes:
        """Bytes as they come, b"" at the end. Raises OSError for a fault of the transport, and when interrupted."""
        ...

    def close(self) -> None:
        """Let go of the sender."""
        ...


class PlainStream:
    """A local file that must be read front to back: compressed, or not a regular file (a named pipe).

    Args:
        fd: its descriptor; opened with O_NONBLOCK where reading may block, so that opening did not.
        num_bytes: its length, None where it has none.
        interrupt: ends the waiting for a named pipe's writer.
    """

    is_remote = False

    def __init__(self, fd: int, num_bytes: int | None, interrupt: Interrupt) -> None:
        self.num_bytes = num_bytes
        self.warnings: list[str] = []
        self._fd = fd
        self._interrupt = interrupt

    def read(self, size: int) -> bytes:
        """The next bytes."""
        while True:
            # Without this wait, a named pipe that nobody has opened for writing yet would seem to be at its end.
            self._interrupt.wait_until_ready(self._fd, select.POLLIN)
            with suppress(BlockingIOError):
                return os.read(self._fd, size)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PipeStream:
    """What `sh -c COMMAND` writes to its standard output.

    A command that fails before it has written anything is run again, after a wait. Once something was handed on there
    is no second run: nobody knows whether it would write the same.

    The command leads a process group of its own, so that close ends whatever it started; if this process is killed,
    the group's guard does.
    """

    is_remote = True
    num_bytes: int | None = None

    def __init__(self, command: str, interrupt: Interrupt) -> None:
        self._command = command
        self._interrupt = interrupt
        self._backoff = Backoff(interrupt, max_tries=COMMAND_TRIES)
        self._last_fault = ""
        self._has_begun = False
        self._start()

    @property
    def warnings(self) -> list[str]:
        """That the command had to be run again."""
        runs = self._backoff.num_retries + 1
        return [f"the command was run {runs} times, the one before the last {self._last_fault}"] if runs > 1 else []

    def read(self, size: int) -> bytes:
        """Bytes as they come; at the end, OSError if the command failed."""
        while not (data := self._next(size)) and (status := self._status()) != 0:
            fault = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
            self.close()
            if self._has_begun or status in _NO_COMMAND or not self._backoff.wait():
                times = f", as in {self._backoff.num_retries} runs before" if self._backoff.num_retries else ""
                raise OSError(f"the command of pipe:{self._command} {fault}{times}")
            self._last_fault = fault
            self._start()
        self._has_begun = True
        return data

    def close(self) -> None:
        """Kill the command and what it started, and collect it."""
        if not self._output.closed:
            self._kill_group()
            self._output.close()
            self._process.wait()

    def _start(self) -> None:
        self._guard = _Guard()
        try:
            self._process = subprocess.Popen(
                ["sh", "-c", self._command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except BaseException:
            self._guard.close()
            raise
        self._guard.watch(self._process.pid)
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def _next(self, size: int) -> bytes:
        try:
            self._interrupt.wait_until_ready(self._output.fileno(), select.POLLIN, COMMAND_STALL_TIMEOUT_S)
        except TimeoutError:
            raise self._stalled("wrote nothing") from None
        return self._output.read(size) or b""

    def _status(self) -> int:
        """Wait for the command, which may go on after it has closed its output."""
        if self._process.returncode is None:
            end = time.monotonic() + COMMAND_STALL_TIMEOUT_S
            while self._process.returncode is None:
                self._interrupt.check()
                if time.monotonic() > end:
                    raise self._stalled("closed its output and did not end")
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(POLL_S)
            # At once, before another group can get its number.
            self._kill_group()
        return self._process.returncode

    def _stalled(self, what: str) -> OSError:
        return OSError(f"the command of pipe:{self._command} {what} for {COMMAND_STALL_TIMEOUT_S:g} s")

    def _kill_group(self) -> None:
        if self._guard.is_open:
            # First the guard: it must not act when the number may be another group's.
            self._guard.close()
            # What is no longer there, or has become another user's, cannot be ended.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


class _Guard:
    """A second `sh` that kills a process group when this process is gone, whatever ended it.

    It waits for the end of its input, whose other end is held here alone. (A parent-death signal would reach the shell,
    but not the commands that the shell runs.)
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", 'read -r group || exit 0; read -r _; kill -s KILL -- "-$group"'],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._lifeline = self._process.stdin

    @property
    def is_open(self) -> bool:
        """Whether it still watches."""
        return not self._lifeline.closed

    def watch(self, group: int) -> None:
        """Name the group to kill."""
        # Somebody may have killed the guard; the command goes on without it.
        with suppress(BrokenPipeError):
            self._lifeline.write(b"%d\n" % group)

    def close(self) -> None:
        """End it without a shot."""
        self._process.kill()
        self._lifeline.close()
        self._process.wait()
