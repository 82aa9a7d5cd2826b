"""Four real processes train, lose each other, and end as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.experience import Experience, SegmentKind
from mulligan.common.types import Outcome
from mulligan.env.client import EnvClient
from mulligan.policy.client import PolicyClient
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.folder import RunState


def check_experiences(chains: list[Experience], steps: int, tasks: int, rollouts: int) -> None:
    """Each chain once, every token sampled by a stamped version, every distilled target without the reflection."""
    assert len(chains) == len({chain.experience_id for chain in chains}) == steps * tasks * rollouts
    for chain in chains:
        for part in chain.samples:
            for sequence in part.sequences:
                sampled = [segment for segment in sequence.segments if segment.kind is SegmentKind.SAMPLED]
                assert sampled and all(len(s.log_probs) == len(s.token_ids) for s in sampled)
                assert all(sum(v.token_count for v in s.policy_versions) == len(s.token_ids) for s in sampled)
                assert all(value <= 0 for value in sequence.log_probs)
        if chain.target("distilled") is not None and chain.sample("second") is not None:
            for target, source in zip(chain.targets[0].sequences, chain["second"].sequences, strict=True):
                assert target.segments[0].token_ids == chain["first"].sequences[0].segments[0].token_ids
                assert [s.token_ids for s in target.segments[1:]] == [s.token_ids for s in source.segments[1:]]


def successes(chains: list[Experience]) -> list[str]:
    """Those whose reflection is memorised: what was cut at its token limit is not."""
    return [
        c.experience_id
        for c in chains
        if c.sample("reflection") is not None
        and c["reflection"].outcome is Outcome.COMPLETED
        and c.sample("second") is not None
        and (c["second"].reward or 0) >= 1
    ]


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """One set of services for all tests that leave them running."""
    return Loop.start(shared_services, tmp_path_factory.mktemp("loop"))


async def test_the_loop_over_four_processes(loop: Loop) -> None:
    policy = PolicyClient(Endpoint(loop.policy.address))
    before = (await policy.info()).policy_version
    info = await loop.train("first", small_run())
    assert info.step == 4
    chains = loop.experiences("first")
    check_experiences(chains, steps=4, tasks=4, rollouts=2)
    assert any(chain.sample("reflection") is not None for chain in chains)
    assert await loop.memorised("first") == successes(chains)
    versions = {
        span.policy_version for c in chains for s in c["first"].sequences[0].segments for span in s.policy_versions
    }
    assert versions == {before + 1 + n for n in range(4)}, "each step is sampled by the weights of the step before"
    assert (await policy.info()).policy_version == before + 5
    await policy.close()
    summary = json.loads((loop.folder / "runs" / "first" / "summary.json").read_text())
    assert {"test_success_before", "test_success_after", "train_seconds", "steps", "rollouts"} <= set(summary)
    client = loop.client()
    fetched = await client.experiences("first", limit=100)
    assert fetched == chains, "the trainer answers what its journal holds"
    again = await client.start("first", small_run())
    assert again.state is RunState.COMPLETED, "starting a run again changes nothing"
    result, version = await client.evaluate("frozenlake-3x3", small_run().evaluation)
    assert result.attempts == 4 and version == before + 5
    same, version = await client.evaluate("frozenlake-3x3", small_run().evaluation, run_id="first")
    assert version == before + 6 and same.success == result.success, "the last checkpoint is what served"
    await client.close()


async def test_a_run_with_lora_publishes_adapters(loop: Loop) -> None:
    info = await loop.train("lora", small_run(steps=2, model={"source": "embedded", "lora": {"rank": 4}}))
    assert info.step == 2
    check_experiences(loop.experiences("lora"), steps=2, tasks=4, rollouts=2)
    gaps = [metrics["mismatch_kl"] for metrics in await loop.metrics("lora") if "mismatch_kl" in metrics]
    assert all(abs(gap) < 1e-6 for gap in gaps), "engine and learner agree on the merged adapter"


async def test_rollouts_and_evaluations_go_on_while_the_learner_works(loop: Loop) -> None:
    policy = PolicyClient(Endpoint(loop.policy.address))
    await policy.load_model("second", "embedded")
    rollout = small_run().rollout.model_copy(update={"max_staleness": 2})
    settings = small_run(policies={"evaluator": "second"}, rollout=rollout.model_dump())
    info = await loop.train("overlapping", settings)
    assert info.step == 4
    chains = loop.experiences("overlapping")
    check_experiences(chains, steps=4, tasks=4, rollouts=2)
    assert await loop.memorised("overlapping") == successes(chains)
    metrics = await loop.metrics("overlapping")
    assert all(0 <= one["staleness_mean"] <= one["staleness_max"] <= 2 for one in metrics)
    assert max(one["staleness_max"] for one in metrics) > 0, "steps were sampled ahead"
    summary = json.loads((loop.folder / "runs" / "overlapping" / "summary.json").read_text())
    assert [point["step"] for point in summary["evaluations"]][-1] == 4
    assert (await policy.info("second")).policy_version == len(summary["evaluations"])
    await policy.unload_model("second")
    await policy.close()


async def test_a_policy_of_its_own_reflects_and_is_measured(loop: Loop) -> None:
    policy = PolicyClient(Endpoint(loop.policy.address))
    await policy.load_model("wise", "embedded", options={"frozen": True})
    await loop.train("reflected", small_run(steps=2, policies={"reflector": "wise"}))
    reflections = [one for chain in loop.experiences("reflected") for one in chain.samples if one.role == "reflection"]
    assert reflections and {(r.policy, r.policy_version) for r in reflections} == {("wise", 0)}
    learned = {name.partition("/")[0] for metrics in await loop.metrics("reflected") for name in metrics if "/" in name}
    assert "reflection" not in learned and "first" in learned
    trainer = loop.client()
    _, version = await trainer.evaluate("frozenlake-3x3", small_run().evaluation, max_tokens=4, policy="wise")
    assert version == 0 != (await policy.info()).policy_version
    await trainer.start("frozen", small_run(steps=1, policies={"actor": "wise"}))
    assert "policies.actor: policy 'wise' is frozen" in await loop.failure("frozen")
    await policy.unload_model("wise")
    for client in (policy, trainer):
        await client.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "victim", ["trainer", *(pytest.param(name, marks=pytest.mark.long) for name in ("env", "policy", "memory"))]
)
async def test_a_killed_service_comes_back_and_the_run_ends(loop: Loop, victim: str) -> None:
    """The policy has no state folder here: it forgets its weights, and is given them again."""
    await kill_twice(loop, victim, f"without-{victim}")


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_trainer_that_ends_in_the_midst_of_a_step_gives_its_learner_back_and_goes_on(loop: Loop) -> None:
    loop.trainer.arguments += ["--drain-seconds", "0.1"]
    loop.trainer.restart()
    client = loop.client()
    await client.start("in-the-midst", small_run())
    await loop.journal_grows("in-the-midst", 10_000)
    assert await asyncio.to_thread(loop.trainer.stop) == 0
    events = [line["event"] for line in loop.trainer.log_lines]
    assert events[-1] == "stopped" and "learner not deleted" not in events
    await asyncio.to_thread(loop.trainer.start)
    info = await loop.ended(client, "in-the-midst")
    await client.close()
    assert info.step == 4
    check_experiences(loop.experiences("in-the-midst"), steps=4, tasks=4, rollouts=2)


async def kill_twice(loop: Loop, victim: str, run_id: str) -> list[str]:
    """What the run said in passing."""
    client = loop.client()
    await client.start(run_id, small_run(steps=6))
    for kill in range(2):
        await loop.journal_grows(run_id, 20_000)
        process = getattr(loop, victim)
        process.kill()
        await asyncio.sleep(0.3 * kill)
        process.start()
    info = await loop.ended(client, run_id)
    await client.close()
    assert info.step == 6
    chains = loop.experiences(run_id)
    check_experiences(chains, steps=6, tasks=4, rollouts=2)
    assert await loop.memorised(run_id) == successes(chains), "nothing is lost or counted twice"
    ended = {part.outcome for chain in chains for part in chain.samples}
    assert ended <= {Outcome.COMPLETED, Outcome.TRUNCATED}, "lost episodes were run again"
    return await loop.notices(run_id)


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_killed_policy_with_a_state_folder_knows_its_weights(loop: Loop, tmp_path: Path) -> None:
    loop.policy.kill()
    loop.policy.arguments += ["--state-folder", str(tmp_path)]
    loop.policy.start()
    notices = await kill_twice(loop, "policy", "remembered")
    assert not [text for text in notices if "lost version" in text]


@pytest.mark.long
async def test_weights_are_streamed_where_no_file_system_is_shared(loop: Loop) -> None:
    """The last to use these services: they stay as they are. In bfloat16 few of the weights change, and only these are
    sent."""
    for service, flags in ((loop.trainer, ["--weights-transfer", "upload"]), (loop.policy, ["--dtype", "bfloat16"])):
        service.kill()
        service.arguments += flags
        service.start()
    await loop.train("uploaded", small_run(steps=2, model={"dtype": "bfloat16"}, optimizer={"learning_rate": 1e-6}))
    uploads = [line for line in loop.policy.log_lines if line.get("method") == "UploadWeights"]
    assert [line["status"] for line in uploads] == ["OK"] * 3, "the initial weights and those of two steps"
    made = [line for line in loop.policy.log_lines if line["event"] == "a whole file was made of a sparse one"]
    assert len(made) == 2 and all(line["sent_bytes"] < line["whole_bytes"] / 5 for line in made)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.long)])
async def test_a_deterministic_run_killed_and_resumed_ends_with_bit_equal_weights(
    services: ServiceProcesses, tmp_path: Path, kills: int
) -> None:
    loop = Loop.start(services, tmp_path, deterministic=True)
    settings = small_run(deterministic=True, steps=3, rollout={"tasks_per_step": 2})
    await loop.train("whole", settings)
    client = loop.client()
    await client.start("cut", settings)
    loop.trainer.forked = False  # the order of sets is another one in each process
    for _ in range(kills):
        await loop.journal_grows("cut", 8_000)
        loop.trainer.restart()
    await loop.ended(client, "cut")
    await client.close()
    expected = loop.weights("whole", 3)
    found = loop.weights("cut", 3)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    whole, cut = (
        [part.sequences[0].token_ids for chain in loop.experiences(run_id) for part in chain.samples]
        for run_id in ("whole", "cut")
    )
    assert whole == cut


async def test_episodes_of_a_killed_env_server_are_never_a_reward(services: ServiceProcesses, tmp_path: Path) -> None:
    env = services.start("env")
    client = EnvClient(Endpoint(env.address, outage_seconds=30))
    episode = await client.start("frozenlake-3x3", "train/00000", "lost")
    env.restart()
    with pytest.raises(Exception, match="UNKNOWN_EPISODE"):
        await episode.step("```Up```")
    await client.close()
