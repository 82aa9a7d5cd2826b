"""Generic prompts, for environments without their own, such as adapted ones."""

from __future__ import annotations

from mulligan.env.base import PromptSet


def generic_prompts(task: str, action_format: str) -> PromptSet:
    """`task` describes the task to the agent, `action_format` the format of its answers."""
    return PromptSet(
        solver=f"{task}\n\n{action_format}",
        action_reminder=action_format,
        reflection_system="""\
You study an agent's attempt at a task and improve the instruction under which it works. The instruction must serve \
for every task of this kind: never write down a solution to this one.""",
        reflection="""\
The attempt: what the agent saw, and what it did.

{trace}

Feedback: {feedback}
Reward: {reward}

The instruction that served best so far, which may be wrong:
{memory}

Find out what went wrong and what the rules must be. Keep what the evidence confirms, correct what it contradicts. \
Then write one short, reusable instruction between <prompt> and </prompt>.""",
        memory_empty="(none yet)",
        trace_turn="{observation}\n\nAgent: {action}\n\n",
        retry=f"""\
{task} This is your second attempt; the first one is below. Do better.

{{trace}}

Feedback: {{feedback}}

{action_format}""",
        try_again=f"{task} You have attempted this before, and that was wrong. Try again.\n\n{action_format}",
    )
