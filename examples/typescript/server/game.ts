/** The environment: guess a number from 1 to 100. Knows nothing of gRPC; its state is the actions played so far. */

import type { EnvironmentInfo } from "../gen/mulligan/env/v1/EnvironmentInfo.js";
import type { StepEpisodeResponse } from "../gen/mulligan/env/v1/StepEpisodeResponse.js";

const TASK = "Find a secret number from 1 to 100. After each guess you are told whether it is higher or lower.";
const FORMAT = "Answer with one number and nothing else.";
const MAX_STEPS = 10;

export const TASK_COUNTS = { train: 80, test: 20 };

export const INFO: EnvironmentInfo = {
  name: "guess-number",
  description: "A number from 1 to 100 that is to be guessed.",
  prompts: {
    solver: `${TASK} ${FORMAT}`,
    actionReminder: FORMAT,
    reflectionSystem: "You improve the instruction of an agent that plays a game.",
    reflection:
      "What the agent saw and did:\n{trace}\nFeedback: {feedback}\nReward: {reward}\n\nThe best instruction so far:\n" +
      "{memory}\n\nWrite a better one between <prompt> and </prompt>. It must not name the number of this game.",
    memoryEmpty: "(none yet)",
    traceTurn: "{observation}\nAgent: {action}\n",
    retry: `${TASK} Your first attempt:\n{trace}\nFeedback: {feedback}\nDo better. ${FORMAT}`,
    tryAgain: `${TASK} You did not find it at your first attempt. ${FORMAT}`,
    reflectionOpen: "<prompt>",
    reflectionClose: "</prompt>",
  },
  maxSteps: MAX_STEPS,
  maxReward: 1,
  deterministic: true,
  trainTaskCount: TASK_COUNTS.train,
  testTaskCount: TASK_COUNTS.test,
  canFork: true,
  playerCount: 1,
};

/** A task's number follows from its id alone. The splits share none: 37 and 100 have no common divisor. */
function secretOf(taskId: string): number | undefined {
  const [, split, digits] = /^(train|test)\/(0|[1-9]\d{0,2})$/.exec(taskId) ?? [];
  const index = Number(digits);
  if (!split || index >= TASK_COUNTS[split as keyof typeof TASK_COUNTS]) return undefined;
  return (((split === "test" ? TASK_COUNTS.train : 0) + index) * 37) % 100 + 1;
}

export function isTask(taskId: string): boolean {
  return secretOf(taskId) !== undefined;
}

export const FIRST_OBSERVATION = "Your first guess?";

/** What the action leads to after `played` others. */
export function play(taskId: string, played: number, action: string): StepEpisodeResponse {
  const secret = secretOf(taskId)!;
  const guess = Number(/\d+/.exec(action)?.[0]);
  const valid = guess >= 1 && guess <= 100;
  const hint = !valid ? FORMAT : guess === secret ? "Found." : guess < secret ? "Higher." : "Lower.";
  const step = { observation: hint, action: valid ? String(guess) : "no number", reward: guess === secret ? 1 : 0 };
  if (guess === secret) return { ...step, done: true, outcome: "OUTCOME_COMPLETED", feedback: "found" };
  if (played + 1 < MAX_STEPS) return step;
  return { ...step, done: true, outcome: "OUTCOME_TRUNCATED", feedback: "not found; halve the range with each guess" };
}
