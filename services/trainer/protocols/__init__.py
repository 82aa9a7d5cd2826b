"""Evaluation protocols, a module each: from a policy and tasks to named metrics.

A module exports

- `Settings`, a subclass of `ProtocolSettings`: one table of `evaluation.protocols`;
- `async def run(player: Player, tasks: Sequence[TaskInfo], settings: Settings) -> dict[str, float]`, which plays with
  the helpers of `Player` (`mulligan.trainer.player`) and returns metrics by name. A metric that cannot be measured is
  left out. `Player.attempts`, and `Player.each` for other than plain attempts, play many at a time, and begin each when
  there is a slot for it.

A setting `samples`, the attempts per task, has at most `MOST_SAMPLES`. A protocol that plays each sample more than
once, such as with a text and without, says so by the property `attempts_per_sample` of its `Settings`. Tasks × samples
× `attempts_per_sample` are at most `MOST_ATTEMPTS`; that is checked before anything is sampled.

It may export `lacks(environment: EnvironmentInfo, tasks: Sequence[TaskInfo], settings: Settings) -> str`: what the
environment must have and has not, "" if nothing. Then the evaluation is refused before anything is sampled. What is
known of single tasks are their `tags`, which the contract of the environment service describes.

`name` is that of a module here, of an entry point of the group `mulligan.protocols`, or of any importable module.
"""

from __future__ import annotations

from pydantic import ConfigDict, Field

from mulligan.common.plugins import Plugins, PluginSettings

MOST_PROTOCOLS = 32  # of an evaluation
MOST_SAMPLES = 10_000  # attempts at a task
MOST_ATTEMPTS = 100_000  # attempts of an evaluation, and of a protocol in it: what they found is kept to the end


class ProtocolSettings(PluginSettings):
    """What every protocol has. A protocol's own `Settings` add to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")

    @property
    def prefix(self) -> str:
        """Begins the names of its metrics."""
        return self.label or self.name.rpartition(".")[2]

    @property
    def samples_per_task(self) -> tuple[str, int]:
        """The setting that says how many samples of a task there are, and that number."""
        samples = getattr(self, "samples", None)
        return "samples", samples if isinstance(samples, int) else 1

    @property
    def attempts_per_sample(self) -> int:
        """How many attempts each of these takes: 2 where a protocol compares two ways to play."""
        return 1


class WritingSettings(ProtocolSettings):
    """Of a protocol that has texts written: by the policy `writer` of the policy service, else by the measured one."""

    writer: str = Field("", max_length=64)


PROTOCOLS = Plugins(
    noun="protocol",
    package=__name__,
    group="mulligan.protocols",
    exports=("Settings", "run"),
    settings=ProtocolSettings,
    reserved=("settings",),  # the field that holds them on the wire
)
