"""A rank's end of the connection to its guard: a thread that answers the guard, and ends this process when told to."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from spmd_infer.multihost.exit_codes import OTHER_FAILED
from spmd_infer.multihost.record import Record

Message = dict[str, Any]

ALIVE_S = 0.25
EXIT_S = 6.0  # for the others to say why they end

_WAITING = {
    ("jax/_src/array.py", None),
    ("jax/_src/api.py", "block_until_ready"),
    ("jax/_src/interpreters/pxla.py", "__call__"),
    ("jaxlib/xla_client.py", None),  # start-up: every process waits for the devices of all
    ("spmd_infer/multihost/link.py", "wait"),
    ("spmd_infer/multihost/channel.py", None),
}


class Link:
    """Talks with the guard; everything is safe to call from any thread.

    Args:
        connection: the socket to the guard.
        record: shared with the guard.
        name: this rank, for messages.
    """

    def __init__(self, connection: socket.socket, record: Record, name: str) -> None:
        self.record = record
        self.name = name
        self.finished = False
        self.guard: subprocess.Popen[bytes] | None = None
        self._socket = connection
        self._lock = threading.Lock()
        self._news = threading.Condition()
        self._received: dict[str, Message] = {}
        self._main = threading.main_thread().ident or 0
        self._thread = threading.Thread(target=self._listen, name="spmd-infer guard link", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Tell the guard; nothing happens where it has ended."""
        try:
            with self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # the listening thread sees the end too, and ends this process

    def wait(self, kinds: Collection[str], seconds: float) -> Message | None:
        """The first message of these kinds that has come or comes in time."""
        until = time.monotonic() + seconds
        with self._news:
            while True:
                for kind in kinds:
                    if kind in self._received:
                        return self._received[kind]
                # In pieces, so that signal handlers run in the main thread.
                if (left := until - time.monotonic()) <= 0:
                    return None
                self._news.wait(min(left, 0.5))

    def fail(self, kind: str, text: str, code: int, shown: str) -> NoReturn:
        """End this process because of itself; what it shows comes after all others have said that they end.

        Args:
            kind: as of ``verdict.Report``.
            text: what happened, for the others' messages.
            code: exit code, where this rank turns out to be the one at fault.
            shown: what to write on standard error then.
        """
        _flush()
        self.send({"t": "failed", "kind": kind, "text": text, "code": code})
        self.wait(("show",), EXIT_S)
        _write(shown if shown.endswith("\n") else f"{shown}\n")
        self.send({"t": "shown"})
        self.wait(("exit",), 2.0)
        os._exit(code)

    def say(self, text: str) -> None:
        """Write a line about this rank on standard error."""
        _write(f"[spmd-infer {self.name}] {text}\n")

    def _listen(self) -> None:
        pending = b""
        while True:
            self.record.alive = time.monotonic()
            ready, _, _ = select.select([self._socket], [], [], ALIVE_S)
            if not ready:
                continue
            try:
                got = self._socket.recv(1 << 16)
            except OSError:
                got = b""
            if not got:
                break
            *lines, pending = (pending + got).split(b"\n")
            for line in lines:
                self._handle(json.loads(line))
        if not self.finished:
            self.say("the job ends: this rank's guard has ended")
            _flush()
            os._exit(OTHER_FAILED)

    def _handle(self, message: Message) -> None:
        kind = message["t"]
        if kind == "where?":
            self.send({"t": "where", **whereabouts(self._main)})
        elif kind == "exit" and "show" not in self._received:
            os._exit(OTHER_FAILED)
        elif kind == "cause" and not message["shows"]:
            if message["kind"] == "stuck":
                _write(f"[spmd-infer {self.name}] its threads:\n{_stacks()}")
            self.say(f"the job ends: {message['title']}")
            _flush()
            self.send({"t": "said"})  # the guard tells when to exit
        with self._news:
            self._received[kind] = message
            self._news.notify_all()


def _stacks() -> str:
    """Where all threads are, in one piece: several ranks may write to one terminal."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def whereabouts(thread: int) -> Message:
    """Where a thread is: the innermost line that is not JAX's, and whether it waits for devices or for other ranks."""
    frame = sys._current_frames().get(thread)
    waits = False
    if frame is not None:
        file, function = _short(frame.f_code.co_filename), frame.f_code.co_name
        waits = (file, None) in _WAITING or (file, function) in _WAITING
        if file == "threading.py" and frame.f_back is not None and frame.f_back.f_back is not None:
            back = frame.f_back if frame.f_back.f_code.co_filename != frame.f_code.co_filename else frame.f_back.f_back
            waits = (_short(back.f_code.co_filename), back.f_code.co_name) in _WAITING
    while frame is not None and frame.f_back is not None and _is_jax(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return {"waits": waits, "where": "an unknown place"}
    return {"waits": waits, "where": f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"}


def _short(file: str) -> str:
    parts = Path(file).parts
    for top in ("jax", "jaxlib", "spmd_infer"):
        if top in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(top) :])
    return parts[-1]


def _is_jax(file: str) -> bool:
    return "/jax/" in file or "/jaxlib/" in file or "/numpy/" in file


def _write(text: str) -> None:
    data = text.encode(errors="replace")
    try:
        while data:
            data = data[os.write(2, data) :]
    except OSError:
        pass  # nobody reads any more


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
