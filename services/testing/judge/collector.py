"""Takes the histories of processes over a socket: a process whose disk is full, or that is killed, loses nothing."""

from __future__ import annotations

import select
import shutil
import socket
import tempfile
import threading
from pathlib import Path


class Collector:
    """Writes a file for each connection. `close` returns when all that was sent is written."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._place = Path(tempfile.mkdtemp(prefix="mulligan-"))  # a socket's path is short
        self.path = self._place / "history"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._waker, self._woken = socket.socketpair()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        """Until it is woken, and then those who had connected by then."""
        ending = False
        while not ending:
            ready, _, _ = select.select([self._listener, self._woken], [], [])
            ending = self._woken in ready
            while (connection := self._connected()) is not None:
                name = self._folder / f"process-{len(self._threads)}.jsonl"
                thread = threading.Thread(target=self._take, args=(connection, name), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _connected(self) -> socket.socket | None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return None
        connection.setblocking(True)
        return connection

    @staticmethod
    def _take(connection: socket.socket, path: Path) -> None:
        with connection, path.open("wb", buffering=0) as file:
            while received := connection.recv(2**16):
                file.write(received)

    def close(self) -> None:
        """Call it when the processes have ended."""
        self._waker.send(b"!")
        self._accepting.join()
        for one in (self._listener, self._waker, self._woken):
            one.close()
        for thread in self._threads:
            thread.join()
        shutil.rmtree(self._place)
