"""The processes of a learner, started by torchrun: who they are, and how they agree.

Process 0 serves LearnerService. It sends each call that a learner executes to the others (`tell`), as the bytes of the
request, and every process does the call's work. What a process says to the others are bytes, numbers and JSON; nothing
is pickled.

All processes must go through the same collective operations. What one of them wants to run is agreed on first
(`least`). Work that may fail in one of them alone, such as reading a file, is done in `together` or `first`: then it
fails in all of them, with the same error, and they go on with the next call. After any other error they are out of
step. Then each of them ends, and torchrun starts all again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import structlog
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mulligan.common.errors import DomainError, Reason

log = structlog.get_logger()
T = TypeVar("T")
_IDLE = timedelta(days=3650)  # how long the processes may wait for a call
_IN_A_CALL = timedelta(hours=2)  # how long they may wait within one, such as for the first one to write a checkpoint
_RESTARTS = 100  # of all processes, over their whole life, before torchrun gives up
_END_SECONDS = 10.0  # after the drain, before torchrun kills its processes
_RESTART = timedelta(seconds=1)
_PARENT_SECONDS = 1.0  # between two looks at whether torchrun lives
_FAILURE = "failure"  # key of the store: what ended a process other than the first
# Of torchrun. With 1, the processes have a store of their own, in the first one, each time that they are started.
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class FailedTogether(RuntimeError):
    """An undeclared error of one process, which all have noticed. They are still in step."""


class RankFailed(RuntimeError):
    """An undeclared error of another process; the message has it."""


class BadLaunch(RuntimeError):
    """torchrun was started in a way in which the processes could not find each other again."""


def launched() -> bool:
    """Whether torchrun started this process, as one of several or alone."""
    return dist.is_torchelastic_launched()


def launch(module: str, arguments: list[str], processes: int, drain_seconds: float) -> None:
    """Becomes torchrun, which runs the module in so many processes and starts all of them again when one dies. At
    SIGTERM they have `drain_seconds`, and a bit more, to end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    torchrun += ["--max-restarts", str(_RESTARTS), "--shutdown-timeout", str(int(drain_seconds + _END_SECONDS))]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun would set it, and say so; the learner sets its own number
    os.environ[_OWN_STORE] = "1"
    os.execv(torchrun[0], [*torchrun, "-m", module, *arguments])


@contextmanager
def refusals_are_final() -> Iterator[None]:
    """A process that ends within because of bad settings ends torchrun, too. It would start the processes again, which
    would refuse the same settings."""
    try:
        yield
    except SystemExit:
        if launched():
            os.kill(os.getppid(), signal.SIGTERM)
        raise


class Ranks:
    """The processes of a learner, and which of them this is. `Ranks()` is one process alone, `Ranks.join()` one of
    those that torchrun started."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.broken = False  # out of step: no further call can be executed
        self._store: Any = None
        self._control: Any = None
        self._mesh: DeviceMesh | None = None

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Waits until all processes that torchrun started are there. `device` is that of the setting. Raises
        BadLaunch."""
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shared and (agents := int(os.environ.get("GROUP_WORLD_SIZE", "1"))) > 1:
            raise BadLaunch(
                f"{_OWN_STORE}: expected 1 in the environment of each of the {agents} torchrun, and --rdzv-backend "
                "c10d: otherwise the processes wait for each other for ever after one of them has died"
            )
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        ranks = cls()
        store, ranks.rank, ranks.size = next(rendezvous("env://"))
        if shared:
            # torchrun keeps its store when it starts the processes again: addresses of those that died are still there.
            # Several torchrun count the starts differently, since each counts those only that its own processes caused.
            store = PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        ranks._store = store
        if ranks.size == 1:
            return ranks
        place = ranks.device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=ranks._store, rank=ranks.rank, world_size=ranks.size, timeout=_IN_A_CALL)
        ranks._control = dist.new_group(backend="gloo", timeout=_IDLE)
        ranks._mesh = init_device_mesh(place.type, (ranks.size,))
        if not ranks.is_first:  # they end when the first one has drained
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        return ranks

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def mesh(self) -> DeviceMesh:
        """Of all processes, in one dimension. There is none for one process."""
        assert self._mesh is not None
        return self._mesh

    def device(self, name: str) -> torch.device:
        """The device of this process: with "cuda", each process of a machine has a GPU of its own."""
        if name == "cuda" and self.size > 1:
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return torch.device(name)

    def leave(self) -> None:
        """The first process ends the others."""
        if self.size == 1 or self.broken:
            return
        try:
            if self.is_first:
                self._broadcast(b"")
            dist.destroy_process_group()
        except RuntimeError as error:  # another process has ended before
            log.warning("the processes did not part", rank=self.rank, cause=str(error))

    def tell(self, name: str, content: Callable[[], bytes]) -> None:
        """In the first process: has the others do what a call is about. `content` is the request, as bytes."""
        if self.size > 1 and not self.broken:
            self._broadcast(name.encode() + b"\0" + content())

    def next_call(self) -> tuple[str, bytes] | None:
        """In the other processes: waits for the next call, its name and its request. None: this process is to end."""
        message = self._broadcast(b"")
        name, _, content = message.partition(b"\0")
        return (name.decode(), content) if message else None

    def sum(self, values: Tensor) -> None:
        """Replaces the values by their sums over all processes."""
        if self.size > 1:
            dist.all_reduce(values)

    def broadcast(self, values: Tensor) -> None:
        """Replaces the values by those of the first process."""
        if self.size > 1:
            dist.broadcast(values, 0)

    def least(self, value: int) -> int:
        """The least of the values that the processes give."""
        if self.size == 1:
            return value
        values = torch.tensor([value])
        dist.all_reduce(values, dist.ReduceOp.MIN, group=self._control)
        return int(values)

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank. It must have a form in JSON."""
        return [json.loads(answer) for answer in self._exchange(json.dumps(value).encode())]

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` in this process, once it has succeeded in all of them. If it fails in one, all raise its
        DomainError, or FailedTogether for any other exception. `work` must not depend on other processes."""
        result: T = self._agree(work, lambda _: None)[0]
        return result

    def first(self, work: Callable[[], T], others: Callable[[], Any] = lambda: None) -> T:
        """The result of `work` in the first process, which must have a form in JSON. Errors are as in `together`. The
        other processes do `others`."""
        if self.size == 1:
            return work()
        chosen: Callable[[], Any] = work if self.is_first else others
        result: T = self._agree(chosen, lambda result: result)[1][0]
        return result

    def _agree(self, work: Callable[[], Any], told: Callable[[Any], Any]) -> tuple[Any, list[Any]]:
        if self.size == 1:
            return work(), []
        result: Any = None
        own: Exception | None = None
        try:
            result = work()
            said: dict[str, Any] = {"result": told(result)}
        except DomainError as error:
            own = error
            said = {"reason": error.reason, "message": error.message, "metadata": error.metadata}
        except Exception as error:  # noqa: BLE001 - raised below, in every process
            own = error
            said = {"failed": f"process {self.rank}: {type(error).__name__}: {error}"[:1000]}
        answers = self.gather(said)
        for answer in answers:
            if "reason" in answer:
                raise DomainError(Reason(answer["reason"]), answer["message"], **answer["metadata"]) from own
            if "failed" in answer:
                raise FailedTogether(answer["failed"]) from own
        return result, [answer["result"] for answer in answers]

    def _broadcast(self, message: bytes) -> bytes:
        """The message of the first process, in all of them."""
        size = torch.tensor([len(message)])
        dist.broadcast(size, 0, group=self._control)
        content = _bytes(message) if self.is_first else torch.empty(int(size), dtype=torch.uint8)
        if len(content):
            dist.broadcast(content, 0, group=self._control)
        return content.numpy().tobytes()

    def _exchange(self, message: bytes) -> list[bytes]:
        """The messages of all processes, in all of them."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(message)]), group=self._control)
        longest = int(max(sizes))
        padded = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(padded, _bytes(message.ljust(longest)), group=self._control)
        return [content.numpy().tobytes()[: int(size)] for content, size in zip(padded, sizes, strict=True)]

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around all that a call does in this process.

        In the first process: an undeclared error passes, or is RankFailed if it began in another process; then this
        process drains and ends. If another process is gone, this one ends at once, as if it had been killed, too. In
        the other processes: an undeclared error is reported, and ends the process.
        """
        if self.broken:
            message = "a process of the learner failed, and all are started again"
            raise DomainError(Reason.SERVICE_UNAVAILABLE, message, retry_after=_RESTART)
        try:
            yield
        except (DomainError, FailedTogether):
            raise
        except Exception as error:
            if self.size == 1:
                raise
            self._end(error)
            raise

    def _end(self, error: Exception) -> None:
        cause = f"process {self.rank}: {type(error).__name__}: {error}"[:1000]
        reported = self._reported()
        if not reported and _is_lost_connection(error):
            log.error("a process of the learner is gone: this one ends, too", rank=self.rank, cause=cause)
            os._exit(1)
        if not self.is_first:
            if not reported:
                log.error("the learner failed: this process ends", rank=self.rank, exc_info=error)
                with suppress(dist.DistError):  # the first process, which may have the store, is gone, too
                    self._store.set(_FAILURE, cause)
            os._exit(1)
        self.broken = True
        log.error("the learner failed: all of its processes end", cause=reported or cause)
        os.kill(os.getpid(), signal.SIGTERM)
        if reported:
            raise RankFailed(reported) from error

    def _reported(self) -> str:
        """What ended another process; empty if nothing is known."""
        try:
            return self._store.get(_FAILURE).decode() if self._store.check([_FAILURE]) else ""
        except dist.DistError:  # the first process, which may have the store, is gone
            return ""


def _bytes(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def _is_lost_connection(error: Exception) -> bool:
    """torch has an exception class for NCCL's errors, but none for gloo's."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _end_with_parent(parent: int) -> None:
    """torchrun cannot end its processes when it is killed itself. They end at once, because another torchrun may start
    others at the same port."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    log.error("torchrun is gone: this process ends, too")
    os._exit(1)
