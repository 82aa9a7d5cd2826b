"""The four services as processes that the judge looks at: TLS, tokens, credentials of runs, a faulty network
before each, recorded calls."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mulligan.cli.local import free_ports
from mulligan.common.access import AccessRole
from mulligan.common.certificates import Certificates
from mulligan.common.channel import Endpoint
from mulligan.common.run_credentials import RunGrant, RunKeys
from mulligan.common.tls import ClientTls
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.testing.judge.collector import Collector
from mulligan.testing.judge.intruders import CREDENTIAL_SECONDS
from mulligan.testing.judge.network import CallFaults, FaultyCalls
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from mulligan.trainer.client import RunClient

NAMES = ("env", "policy", "memory", "trainer")
SERVED: Mapping[str, Sequence[str]] = {
    "env": ("mulligan.env.v1.EnvService",),
    "policy": ("mulligan.policy.v1.PolicyService", "mulligan.policy.v1.PolicyAdminService"),
    "memory": ("mulligan.memory.v1.MemoryService",),
    "trainer": ("mulligan.trainer.v1.RunService", "mulligan.trainer.v1.LearnerService"),
}
STATE = ("runs", "checkpoints", "weights")  # folders of the trainer
_LAUNCH = ("-m", "mulligan.testing.judge.launch")
_FAKETIME = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/local/lib/faketime/libfaketimeMT.so.1")
_OUTAGE_SECONDS = 300.0  # a busy machine takes a minute to start a service


@dataclass
class Cluster:
    """`plugins` are those of `launch.py`, by service. Clocks can be moved where libfaketime is installed."""

    folder: Path
    services: ServiceProcesses
    chance: random.Random
    faults: CallFaults = CallFaults()
    plugins: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*STATE, "memory", "policy", "clocks", "tokens"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.tokens = {role: secrets.token_hex(32) for role in AccessRole}
        for role, token in self.tokens.items():
            (self.folder / "tokens" / role).write_text(f"{token}\n")
            (self.folder / f"token-{role}").write_text(f"{token}\n")
        Certificates(self.folder / "certs").update()  # and keys of runs
        self.keys = RunKeys(self._certified("trainer", "run-keys.pem"))
        self.ca = self._certified("trainer", "ca.crt")
        self.collector = Collector(self.folder / "history")
        self.faketime = next((str(path) for where in _FAKETIME for path in Path("/").glob(where[1:])), "")
        self.processes: dict[str, ServiceProcess] = {}
        self.networks: dict[str, FaultyCalls] = {}

    def _certified(self, name: str, file: str) -> Path:
        return self.folder / "certs" / "services" / name / file

    async def start(self) -> None:
        address = {name: f"127.0.0.1:{port}" for name, port in free_ports().items()}
        for name in NAMES:
            seed = random.Random(self.chance.random())
            network = FaultyCalls(lambda target=address[name]: target, self.faults, seed, ca=self.ca.read_bytes())  # type: ignore[misc]
            self.networks[name] = network
            await self.networks[name].start()
        with ThreadPoolExecutor() as pool:  # all at once: importing torch takes seconds
            started = {name: pool.submit(self._start, name, address[name]) for name in NAMES}
            self.processes = {name: await asyncio.wrap_future(future) for name, future in started.items()}

    def _start(self, name: str, address: str) -> ServiceProcess:
        options = [option for plugin in self.plugins.get(name, ()) for option in ("--plugin", plugin)]
        if name == "trainer":
            options += ["--history", str(self.collector.path), "--caller", name]
            options += ["--credential-seconds", str(CREDENTIAL_SECONDS)]  # clocks jump
            for state in STATE:
                options += ["--synced", str(self.copies(state)), str(self.folder / state)]
        return self.services.start(
            name,
            environment=self._clock(name),
            address=address,
            start_seconds=_OUTAGE_SECONDS,
            program=[*_LAUNCH, *options, name],
            tokens_folder=self.folder / "tokens",
            tls_certificate=self._certified(name, "tls.crt"),
            tls_key=self._certified(name, "tls.key"),
            **self._settings(name),
        )

    def copies(self, state: str) -> Path:
        return self.folder / "synced" / state

    def _settings(self, name: str) -> dict[str, Any]:
        others: dict[str, dict[str, Any]] = {
            "env": {},
            "policy": {
                "weights_folder": self.folder / "weights",
                "state_folder": self.folder / "policy",
                "threads": 1,
            },
            "memory": {
                "database": self.folder / "memory" / "memory.db",
                "run_keys": self._certified(name, "run-keys.pem"),
            },
        }
        if name in others:
            return others[name]
        settings: dict[str, Any] = {"outage_seconds": _OUTAGE_SECONDS, "threads": 1}
        settings |= {"runs_folder": self.folder / "runs", "checkpoint_folder": self.folder / "checkpoints"}
        settings |= {"weights_folder": self.folder / "weights", "run_keys": self._certified(name, "run-keys.pem")}
        for other, role in (("env", "actor"), ("policy", "trainer"), ("memory", "trainer"), ("learner", "trainer")):
            settings[f"{other}_address"] = self.networks["trainer" if other == "learner" else other].address
            settings[f"{other}_token_file"] = self.folder / f"token-{role}"
        return settings

    def _clock(self, name: str) -> dict[str, str]:
        if not self.faketime:
            return {}
        self.move_clock(name, 0)
        return {
            "LD_PRELOAD": self.faketime,
            "FAKETIME_TIMESTAMP_FILE": str(self.folder / "clocks" / name),
            "FAKETIME_CACHE_DURATION": "1",  # seconds between two looks at the file
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # it does not jump on real machines either
            "NO_FAKE_STAT": "1",
        }

    def move_clock(self, name: str, seconds: int) -> None:
        """The service's clock is so far ahead of the machine's from now on, within a second."""
        file = self.folder / "clocks" / name
        new = file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(file)

    def endpoint(self, name: str, credential: str = "") -> Endpoint:
        """Past the network. The credential is a run's."""
        return Endpoint(
            self.processes[name].address,
            token=self.tokens[AccessRole.TRAINER],
            run_credential=(lambda: credential) if credential else None,
            tls=ClientTls(self.ca),
            outage_seconds=_OUTAGE_SECONDS,
        )

    def clients(self, run_id: str) -> tuple[RunClient, PolicyClient, MemoryClient]:
        """Those of who starts the run: the first has its credential."""
        credential = self.keys.sign(RunGrant(run_id, (run_id,)), CREDENTIAL_SECONDS)
        return (
            RunClient(self.endpoint("trainer", credential)),
            PolicyClient(self.endpoint("policy")),
            MemoryClient(self.endpoint("memory")),
        )

    def calm(self) -> None:
        for network in self.networks.values():
            network.calm = True

    async def stop(self) -> None:
        """Ends all, so that the history is complete."""
        for network in self.networks.values():
            await network.stop()
        await asyncio.to_thread(self.services.end)
        await asyncio.to_thread(self.collector.close)
