"""What the filter of system calls lets through: a sweep over all numbers, by the kernel and for both architectures."""

from __future__ import annotations

import errno
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import pyseccomp
import pytest

from mulligan.env.sandbox_filter import CallFilter, Calls, allowed, conditions
from tests.support.bpf import ALLOWED, KILLED, BpfProgram, refused_with

LAST = 511
REFUSED = (errno.EPERM, errno.ENOSYS)
# Allowed calls that the sweep does not make, and what they do with arguments that no call can use.
ENDING = {"exit": (0, 255), "exit_group": (0, 255), "rt_sigreturn": (-signal.SIGSEGV, -signal.SIGSEGV)}
WAITING = {"pause"}
FORKING = {"fork", "vfork"}  # both processes would go on with the sweep
# The kernel answers these itself: there is no futex operation -1.
ENOSYS_ITSELF = {"futex"}
# Return probes of the kernel: Linux does not ask filters about them, and ends processes that call them.
PROBES = {335, 336} if platform.machine() == "x86_64" else set()
ARCHITECTURES = {"x86_64": pyseccomp.Arch.X86_64, "aarch64": pyseccomp.Arch.AARCH64}


def number(name: str, architecture: int = pyseccomp.Arch.NATIVE) -> int:
    return int(pyseccomp.resolve_syscall(architecture, name))


def names(architecture: int = pyseccomp.Arch.NATIVE) -> dict[int, str]:
    """All calls that libseccomp knows."""
    found = {}
    for n in range(LAST + 1):
        try:
            found[n] = pyseccomp.resolve_syscall(architecture, n).decode()
        except (ValueError, OSError):
            continue
    return found


def under_filter(calls: Calls, made: Sequence[str], *, network: bool = False) -> list[int]:
    """The errno of each call, made one after the other in a process with the filter."""
    arguments = [sys.executable, "-m", "tests.support.sandboxed_calls", calls.name, f"{network:d}", *made]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, (ended.returncode, ended.stdout.splitlines()[-1:], ended.stderr[-500:])
    return [int(line.split()[1]) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize("calls", Calls)
def test_the_kernel_refuses_every_call_that_is_not_listed(calls: Calls) -> None:
    listed = allowed(calls, network=False)
    kept = {number(name) for name in (*ENDING, *WAITING, *FORKING) if name in listed} | PROBES
    swept = [n for n in range(LAST + 1) if n not in kept]
    found = dict(zip(swept, under_filter(calls, [f"{n}" for n in swept]), strict=True))
    let_through = {n for n, code in found.items() if code not in REFUSED}
    expected = {number(name) for name in listed - ENOSYS_ITSELF} - kept
    if calls is Calls.WITH_PROCESSES:
        expected.add(number("tgkill"))  # allowed with any arguments
    assert let_through == {n for n in expected if n >= 0}


@pytest.mark.parametrize("name", list(ENDING))
def test_calls_that_end_a_process_end_it(name: str) -> None:
    arguments = [sys.executable, "-m", "tests.support.sandboxed_calls", "ALONE", "0", f"{number(name)}"]
    ended = subprocess.run(arguments, capture_output=True, timeout=60, check=False)
    assert ended.returncode in ENDING[name] and not ended.stdout


def test_a_pause_waits_for_a_signal() -> None:
    arguments = [sys.executable, "-m", "tests.support.sandboxed_calls", "ALONE", "0", f"{number('alarm')}:1"]
    # The alarm is ignored, so the pause ends with the interrupt alone.
    process = subprocess.Popen([*arguments, f"{number('pause')}"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"0 0\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.kill()
    process.communicate()


THREAD = 0x3D0F00  # what glibc's pthread_create asks for
# Arguments, and whether a process on its own may use them, a process that starts others, and one with a network.
ARGUMENTS = [
    ("kill:self,0", True, True),
    ("kill:parent,0", False, True),
    ("kill:-1,0", False, True),
    ("kill:0,0", False, True),
    ("tgkill:self,self,0", True, True),
    ("tgkill:parent,parent,0", False, True),
    ("tkill:self,0", False, False),
    ("rt_sigqueueinfo:parent,0,0", False, False),
    ("rt_tgsigqueueinfo:parent,parent,0,0", False, False),
    ("pidfd_send_signal:0,0,0,0", False, False),
    ("prlimit64:0,7,0,0", True, True),
    ("prlimit64:self,7,0,0", False, False),
    ("prlimit64:parent,7,0,0", False, False),
    ("sched_setaffinity:0,8,0", True, True),
    ("sched_setaffinity:parent,8,0", False, False),
    ("setpriority:0,0,0", True, True),
    ("setpriority:0,parent,0", False, False),
    ("setpriority:2,0,0", False, False),  # all processes of the user
    ("prctl:16,0,0,0,0", True, True),
    ("prctl:1,0,0,0,0", False, True),  # PR_SET_PDEATHSIG
    ("prctl:0x100000001,0,0,0,0", False, False),  # upper bits that the kernel ignores
    ("prctl:4,1,0,0,0", False, False),  # PR_SET_DUMPABLE
    ("prctl:36,0,0,0,0", False, False),  # PR_SET_CHILD_SUBREAPER
    ("ioctl:0,0x5401,0", True, True),
    ("ioctl:0,0x5412,0", False, False),  # TIOCSTI writes to a terminal
    ("ioctl:0,0x8901,0", False, False),  # FIOSETOWN
    ("fcntl:0,3,0", True, True),
    ("fcntl:0,8,parent", False, False),  # F_SETOWN
    ("fcntl:0,10,9", False, False),  # F_SETSIG
    ("fcntl:0,15,0", False, False),  # F_SETOWN_EX
    ("personality:0xffffffff", True, True),
    ("personality:0x40000", False, False),  # addresses that are not random
    ("socketpair:1,1,0,0", True, True),
    ("socketpair:1,0x80801,0,0", True, True),  # SOCK_CLOEXEC, SOCK_NONBLOCK
    ("socketpair:1,2,0,0", False, False),
    ("socket:1,1,0", False, False),
    ("socket:2,1,0", False, False),
    ("socket:16,3,0", False, False),
    ("memfd_create:0,0", False, False),
    ("shmget:0,4096,0", False, False),
]


def clones() -> list[tuple[str, int, bool, bool]]:
    """What kind of process, its flags, and who may start it. Only the simulation does: `clone` has effects."""
    new = {"mount": 0x00020000, "user": 0x10000000, "pid": 0x20000000, "network": 0x40000000, "cgroup": 0x02000000}
    kinds = [("a thread", THREAD, True, True), ("a process", signal.SIGCHLD, False, True)]
    kinds += [(f"a thread, {name}", THREAD | flag, False, False) for name, flag in new.items()]
    kinds += [(f"a process, {name}", signal.SIGCHLD | flag, False, False) for name, flag in new.items()]
    return [*kinds, ("a brother", signal.SIGCHLD | 0x8000, False, False)]


@pytest.mark.parametrize("calls", Calls)
def test_the_kernel_refuses_arguments_that_act_on_others(calls: Calls) -> None:
    made = []
    expected = []
    for written, alone, with_processes in ARGUMENTS:
        name, _, arguments = written.partition(":")
        made.append(f"{number(name)}:{arguments}")
        expected.append((written, alone if calls is Calls.ALONE else with_processes))
    found = under_filter(calls, made)
    assert [(call[0], code not in REFUSED) for call, code in zip(ARGUMENTS, found, strict=True)] == expected


def test_with_a_network_there_are_sockets_of_the_internet_and_no_others() -> None:
    families = [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_PACKET, socket.AF_NETLINK, 38, 40]
    made = [f"{number('socket')}:{int(family)},1,0" for family in families]
    found = under_filter(Calls.ALONE, made, network=True)
    assert found[0] == 0 and found[1] in (0, errno.EAFNOSUPPORT) and found[2:] == [errno.EPERM] * 5


@pytest.mark.parametrize("calls", Calls)
@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_both_architectures_let_the_same_calls_through(machine: str, network: bool, calls: Calls) -> None:
    architecture = ARCHITECTURES[machine]
    rules = CallFilter(calls, network=network, architecture=architecture)
    rules.add_process(os.getpid())
    program = BpfProgram(rules.rules)
    listed = allowed(calls, network=network) | ({"tgkill"} if calls is Calls.WITH_PROCESSES else set())
    known = names(architecture)
    assert len(known) > 290 and {"read", "openat", "futex", "ppoll", "clone"} <= set(known.values())
    for n in range(LAST + 1):
        action = program.run(architecture, n, [-1] * 6)
        if known.get(n) in listed:
            assert action == ALLOWED, known[n]
        else:
            assert refused_with(action) in REFUSED, known.get(n, n)
    for other in {*ARCHITECTURES.values(), pyseccomp.Arch.X86, pyseccomp.Arch.ARM} - {architecture}:
        assert program.run(other, number("getpid", architecture)) == KILLED
    if machine == "x86_64":
        assert program.run(architecture, 0x40000000 | number("getpid", architecture)) == KILLED  # x32


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_both_architectures_check_the_same_arguments(machine: str) -> None:
    architecture = ARCHITECTURES[machine]
    processes = {"self": os.getpid(), "parent": os.getppid()}
    cases = [(written, alone, more) for written, alone, more in ARGUMENTS]
    cases += [(f"clone:{flags}", alone, more) for _, flags, alone, more in clones()]
    for calls in Calls:
        rules = CallFilter(calls, network=False, architecture=architecture)
        rules.add_process(os.getpid())
        program = BpfProgram(rules.rules)
        for written, alone, more in cases:
            name, _, listed = written.partition(":")
            arguments = [processes.get(value) or int(value, 0) for value in listed.split(",")]
            action = program.run(architecture, number(name, architecture), arguments)
            assert (action == ALLOWED) is (alone if calls is Calls.ALONE else more), (calls, written)


def test_no_name_is_misspelt_and_none_is_listed_twice() -> None:
    every = {name for architecture in ARCHITECTURES.values() for name in names(architecture).values()}
    for calls in Calls:
        whole = allowed(calls, network=True)
        assert whole <= every, whole - every
        assert not whole & conditions(calls, network=True).keys()
