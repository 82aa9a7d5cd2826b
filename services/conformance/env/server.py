"""Checks of an environment server, whatever it serves."""

from __future__ import annotations

from uuid import uuid4

from mulligan.conformance import common
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.conformance.target import CheckSession, Refusal
from mulligan.env.v1 import env_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
NOTHING = pb.ListEnvironmentsRequest()
_ALWAYS = "conformance-of-bad-fields"


async def starts_together(session: CheckSession) -> None:
    """Raises NotApplicable where the server leaves StartEpisodes out."""
    start = pb.StartEpisodeRequest(episode_id=f"conformance-{uuid4()}", environment="no-such-environment", task_id="y")
    answer = await session.attempt("StartEpisodes", pb.StartEpisodesRequest(starts=[start]))
    if isinstance(answer, Refusal) and answer.code == "UNIMPLEMENTED":
        raise NotApplicable("the server leaves StartEpisodes out")


@suite.check("ListEnvironments", "each environment is listed once, under a name")
async def listed_once(session: CheckSession) -> None:
    names = [info.name for info in (await session.ask("ListEnvironments", NOTHING)).environments]
    demand(all(names), "each environment has a name", f"names {names}")
    demand(len(set(names)) == len(names), "each environment is listed once", f"names {names}")


@suite.check("ListEnvironments", "asked again, it answers the same")
async def listed_again(session: CheckSession) -> None:
    first, again = [await session.ask("ListEnvironments", NOTHING) for _ in range(2)]
    demand(first == again, "the call is idempotent", f"{len(first.environments)} environments, and then others")


@suite.check("ListTasks", "an unknown environment is NOT_FOUND UNKNOWN_ENVIRONMENT")
async def unknown_environment_listed(session: CheckSession) -> None:
    request = pb.ListTasksRequest(environment=f"no-such-environment-{uuid4()}", split=pb.SPLIT_TRAIN)
    await session.refused("ListTasks", request, "NOT_FOUND", "UNKNOWN_ENVIRONMENT")


@suite.check("StartEpisode", "an unknown environment is NOT_FOUND UNKNOWN_ENVIRONMENT")
async def unknown_environment_started(session: CheckSession) -> None:
    name = f"no-such-environment-{uuid4()}"
    episode_id = f"conformance-{uuid4()}"
    session.later("EndEpisode", pb.EndEpisodeRequest(episode_id=episode_id))
    request = pb.StartEpisodeRequest(episode_id=episode_id, environment=name, task_id="a task")
    await session.refused("StartEpisode", request, "NOT_FOUND", "UNKNOWN_ENVIRONMENT")


@suite.check("StepEpisode", "a step of an episode that was never started is NOT_FOUND UNKNOWN_EPISODE")
async def unknown_episode_stepped(session: CheckSession) -> None:
    request = pb.StepEpisodeRequest(episode_id=f"conformance-{uuid4()}", action="an action")
    await session.refused("StepEpisode", request, "NOT_FOUND", "UNKNOWN_EPISODE")


@suite.check("EndEpisode", "ending an episode that was never started succeeds")
async def unknown_episode_ended(session: CheckSession) -> None:
    await session.ask("EndEpisode", pb.EndEpisodeRequest(episode_id=f"conformance-{uuid4()}"))


@suite.check("ForkEpisode", "a fork of an episode that was never started is refused")
async def unknown_episode_forked(session: CheckSession) -> None:
    request = pb.ForkEpisodeRequest(
        episode_id=f"conformance-{uuid4()}", step_index=0, new_episode_id=f"conformance-{uuid4()}"
    )
    found = await session.attempt("ForkEpisode", request)
    allowed = (("NOT_FOUND", "UNKNOWN_EPISODE"), ("UNIMPLEMENTED", "FORK_UNSUPPORTED"))
    refused = isinstance(found, Refusal) and (found.code, found.reason) in allowed
    demand(refused, "NOT_FOUND UNKNOWN_EPISODE, or UNIMPLEMENTED FORK_UNSUPPORTED", found, request)


BAD_LISTS: dict[str, pb.ListTasksRequest] = {
    "environment": pb.ListTasksRequest(environment="", split=pb.SPLIT_TRAIN),
    "page_size": pb.ListTasksRequest(environment="x", split=pb.SPLIT_TRAIN, page_size=1001),
    "page_token": pb.ListTasksRequest(environment="x", split=pb.SPLIT_TRAIN, page_token="t" * 1001),
    "split": pb.ListTasksRequest(environment="x", split=pb.SPLIT_UNSPECIFIED),
}


@suite.check("ListTasks", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_lists(session: CheckSession) -> None:
    for field, request in BAD_LISTS.items():
        await session.bad_field("ListTasks", request, field)
    negative = pb.ListTasksRequest(environment="x", split=pb.SPLIT_TRAIN, page_size=-1)
    await session.bad_field("ListTasks", negative, "page_size")
    undefined = pb.ListTasksRequest(environment="x", split=99)  # type: ignore[arg-type]  # on purpose
    await session.bad_field("ListTasks", undefined, "split")


BAD_STARTS: tuple[tuple[str, pb.StartEpisodeRequest], ...] = (
    ("episode_id", pb.StartEpisodeRequest(episode_id="", environment="x", task_id="y")),
    ("episode_id", pb.StartEpisodeRequest(episode_id="e" * 201, environment="x", task_id="y")),
    ("environment", pb.StartEpisodeRequest(episode_id=_ALWAYS, environment="", task_id="y")),
    ("task_id", pb.StartEpisodeRequest(episode_id=_ALWAYS, environment="x", task_id="")),
    ("task_id", pb.StartEpisodeRequest(episode_id=_ALWAYS, environment="x", task_id="t" * 201)),
)


@suite.check("StartEpisode", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_starts(session: CheckSession) -> None:
    for field, request in BAD_STARTS:
        await session.bad_field("StartEpisode", request, field)


@suite.check("StartEpisodes", "a malformed batch is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_batches_of_starts(session: CheckSession) -> None:
    await starts_together(session)
    start = pb.StartEpisodeRequest(episode_id=_ALWAYS, environment="x", task_id="y")
    starts = [pb.StartEpisodeRequest(episode_id=f"{_ALWAYS}-{n}", environment="x", task_id="y") for n in range(1025)]
    await session.bad_field("StartEpisodes", pb.StartEpisodesRequest(), "starts")
    await session.bad_field("StartEpisodes", pb.StartEpisodesRequest(starts=starts), "starts")
    for field, bad in BAD_STARTS:
        request = pb.StartEpisodesRequest(starts=[start, bad])
        await session.bad_field("StartEpisodes", request, f"starts[1].{field}")
    for seconds in (-1, 3601):
        request = pb.StartEpisodesRequest(starts=[start])
        request.max_wait.seconds = seconds
        await session.bad_field("StartEpisodes", request, "max_wait")


@suite.check("StartEpisodes", "a batch in which an id appears twice is INVALID_ARGUMENT INVALID_FIELD")
async def repeated_start(session: CheckSession) -> None:
    await starts_together(session)
    start = pb.StartEpisodeRequest(episode_id=f"conformance-{uuid4()}", environment="x", task_id="y")
    session.later("EndEpisode", pb.EndEpisodeRequest(episode_id=start.episode_id))
    await session.bad_field("StartEpisodes", pb.StartEpisodesRequest(starts=[start, start]), "starts")


@suite.check("StepEpisode", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_steps(session: CheckSession) -> None:
    await session.bad_field("StepEpisode", pb.StepEpisodeRequest(episode_id="", action="a"), "episode_id")
    negative = pb.StepEpisodeRequest(episode_id=_ALWAYS, step_index=-1, action="a")
    await session.bad_field("StepEpisode", negative, "step_index")


@suite.check("StepEpisode", "an action of more than 4 MiB is refused")
async def huge_action(session: CheckSession) -> None:
    """A server with a smaller limit of messages refuses without ErrorInfo, which is allowed."""
    request = pb.StepEpisodeRequest(episode_id=_ALWAYS, action="x" * (4 * 2**20 + 1))
    answer = await session.attempt("StepEpisode", request)
    if isinstance(answer, Refusal) and answer.code == "RESOURCE_EXHAUSTED" and not answer.reason:
        return
    await session.bad_field("StepEpisode", request, "action")


@suite.check("StepEpisodes", "a malformed batch is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_batches(session: CheckSession) -> None:
    steps = [pb.StepEpisodeRequest(episode_id=f"{_ALWAYS}-{n}", action="a") for n in range(1025)]
    await session.bad_field("StepEpisodes", pb.StepEpisodesRequest(), "steps")
    await session.bad_field("StepEpisodes", pb.StepEpisodesRequest(steps=steps), "steps")
    for seconds in (-1, 3601):
        request = pb.StepEpisodesRequest(steps=steps[:1])
        request.max_wait.seconds = seconds
        await session.bad_field("StepEpisodes", request, "max_wait")


@suite.check("StepEpisodes", "a batch in which an episode appears twice is INVALID_ARGUMENT INVALID_FIELD")
async def repeated_item(session: CheckSession) -> None:
    step = pb.StepEpisodeRequest(episode_id=f"conformance-{uuid4()}", action="a")
    await session.bad_field("StepEpisodes", pb.StepEpisodesRequest(steps=[step, step]), "steps")


@suite.check("EndEpisode", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_end(session: CheckSession) -> None:
    await session.bad_field("EndEpisode", pb.EndEpisodeRequest(), "episode_id")


@suite.check("ForkEpisode", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_forks(session: CheckSession) -> None:
    for field, request in (
        ("episode_id", pb.ForkEpisodeRequest(new_episode_id="b")),
        ("step_index", pb.ForkEpisodeRequest(episode_id="a", step_index=-1, new_episode_id="b")),
        ("new_episode_id", pb.ForkEpisodeRequest(episode_id="a")),
    ):
        answer = await session.attempt("ForkEpisode", request)
        if isinstance(answer, Refusal) and answer.reason == "FORK_UNSUPPORTED":
            raise NotApplicable("the server forks nothing")
        await session.bad_field("ForkEpisode", request, field)


common.add_credential(suite, "ListEnvironments", NOTHING)
common.add_roles(suite, "EndEpisode", pb.EndEpisodeRequest(episode_id="no-such-episode"))
common.add_health(suite)
common.add_reflection(suite, "mulligan.env.v1.EnvService")
