"""Self-distillation policy optimisation (SDPO): arXiv 2601.20802.

    y_1 … y_n ~ π(·|x) → r_i, f_i                      attempts, each with feedback in words
    s_i: an attempt of another member that solved the task, if there is one
    c_i = s_i, or f_i where there is none              what the teacher is told
    L = Σ_t D_β(π(·|x, y_i<t) ‖ π̄(·|x, c_i, y_i<t))    at each token that the policy sampled itself

The teacher π̄ is the same model with more in its context, without gradient. It re-evaluates the attempt knowing how it
went, so each token gets a signal of its own. β = 1 is the reverse KL divergence KL(student ‖ teacher), 0 the forward
one, ½ the Jensen-Shannon divergence. Where there is neither s_i nor f_i, nothing is taught.

Published: n 8, batch 32; with feedback β 1, learning rate 1e-6, without it β ½, learning rate 1e-5; a mean over tokens;
feedback only where no member solved the task. Reported: above GRPO on LiveCodeBench v6 with a fraction of its samples.

Deviations:
1. The teacher has the present weights; the paper's are a moving average of them (rate 0.01 to 0.05).
2. The divergence is over the whole vocabulary, not over the 20 or 100 likeliest tokens.
3. An attempt is never shown to its own teacher. The first other success is shown, not a random one, as a trace.
4. Feedback is that of the environment, and only of attempts that did not solve the task.
5. `first_weight` adds a policy gradient, which the paper mixes in as a variant. Its default is 0.
6. Attempts that end in an infrastructure error neither teach nor learn.
7. Student and teacher are at the temperature of the sampling (`rollout.temperature`), not at 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from mulligan.common.experience import Sample
from mulligan.trainer.aggregation import Aggregation, aggregate
from mulligan.trainer.algorithms import CUT_TEXTS, READING, SUPERVISED, Played
from mulligan.trainer.batch import Group, divergence, gradients, number_trained, with_reward
from mulligan.trainer.data import Datum
from mulligan.trainer.member import Member
from mulligan.trainer.settings import AlgorithmSettings
from mulligan.trainer.texts import fill, trace_of

FIRST = "first"
TEACHER = "teacher"
TAUGHT = "taught"


class Settings(AlgorithmSettings):
    name: str = "sdpo"
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    # β, from 0 (forward KL divergence) to 1 (reverse).
    beta: float = Field(1.0, ge=0, le=1)
    # Whether the teacher gets feedback also where it sees a solution.
    feedback_with_solution: bool = False
    # The teacher's system prompt: {solver} is that of the environment; {solution} and {feedback} are the two texts
    # below, or nothing.
    teacher_prompt: str = "{solver}{solution}{feedback}\n\nCorrectly solve the original task."
    # {trace}: the successful attempt, turn by turn.
    solution_text: str = "\n\nCorrect solution:\n\n{trace}"
    # {feedback}: the environment's.
    feedback_text: str = "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}"
    # Weights, ≥ 0, of the divergence and of a policy gradient on the same attempts.
    distillation_weight: float = Field(1.0, ge=0)
    first_weight: float = Field(0.0, ge=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return CUT_TEXTS | READING | (frozenset() if self.first_weight else SUPERVISED)


PLAYS = Played(1, copies=1)
REMEMBERS = False


async def play(member: Member[Settings]) -> None:
    first = await member.attempt(FIRST)
    others = await member.siblings(FIRST)
    if first.reward is None:
        return
    solution = next((other for other in others if member.solves(other)), None)
    system = teacher_prompt(member, first, solution)
    if system is not None:
        await member.under(TEACHER, first, system=system)


def teacher_prompt(member: Member[Settings], first: Sample, solution: Sample | None) -> str | None:
    """What the teacher is told, None where there is nothing to tell."""
    settings = member.settings
    feedback = "" if member.solves(first) else first.feedback
    if solution is not None and not settings.feedback_with_solution:
        feedback = ""
    if solution is None and not feedback:
        return None
    return fill(
        settings.teacher_prompt,
        solver=member.prompts.solver,
        solution=fill(settings.solution_text, trace=trace_of(solution, member.prompts)) if solution else "",
        feedback=fill(settings.feedback_text, feedback=feedback) if feedback else "",
    )


def train(groups: Sequence[Group], settings: Settings) -> list[Datum]:
    """Branch `taught`: the divergence of the attempts that have a teacher. Branch `first`: their policy gradients."""
    data: list[Datum] = []
    if settings.first_weight > 0:
        firsts = with_reward(groups, FIRST)
        data += gradients(firsts, settings, settings.first_weight / number_trained(firsts), FIRST)
    return data + taught(groups, FIRST, settings, settings.beta, settings.distillation_weight)


def taught(
    groups: Sequence[Group], role: str, settings: AlgorithmSettings, beta: float, branch_weight: float
) -> list[Datum]:
    """The samples of a role whose tokens also stand under a teacher's prompt."""
    found = [(one[role], target) for group in groups for one in group if (target := one.target(TEACHER))]
    pairs = [(sample, target) for sample, target in found if sample.sequences]
    data: list[Datum] = []
    for sample, target in pairs:
        data += divergence(sample, target, beta, branch_weight / len(pairs), TAUGHT)
    return aggregate(data, settings.aggregation, settings.aggregation_constant)
