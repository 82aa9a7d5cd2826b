/** The constraints that the contract puts on requests (its buf.validate options). */

import { invalidField } from "./errors.js";

const ACTION_BYTES = 4 * 1024 * 1024;

export function checkId(field: string, value: string): void {
  const length = [...value].length; // characters, not UTF-16 units
  if (length < 1 || length > 200) throw invalidField(field, "1 to 200 characters");
}

export function checkRange(field: string, value: number, least: number, most: number): void {
  if (value < least || value > most) throw invalidField(field, `${least} to ${most}`);
}

export interface Step {
  episodeId: string;
  stepIndex: number;
  action: string;
}

export function checkStep(step: Step, path = ""): void {
  checkId(`${path}episode_id`, step.episodeId);
  checkRange(`${path}step_index`, step.stepIndex, 0, 2 ** 31 - 1);
  if (Buffer.byteLength(step.action) > ACTION_BYTES) throw invalidField(`${path}action`, `at most ${ACTION_BYTES} bytes`);
}

export interface Start {
  episodeId: string;
  environment: string;
  taskId: string;
}

export function checkStart({ episodeId, environment, taskId }: Start, path = ""): void {
  checkId(`${path}episode_id`, episodeId);
  checkId(`${path}environment`, environment);
  checkId(`${path}task_id`, taskId);
}

export function checkStarts(starts: Start[]): void {
  if (starts.length < 1 || starts.length > 1024) throw invalidField("starts", "1 to 1024 items");
  starts.forEach((start, index) => checkStart(start, `starts[${index}].`));
  if (new Set(starts.map((start) => start.episodeId)).size < starts.length) {
    throw invalidField("starts.episode_id", "each episode once");
  }
}

export function checkSteps(steps: Step[]): void {
  if (steps.length < 1 || steps.length > 1024) throw invalidField("steps", "1 to 1024 items");
  steps.forEach((step, index) => checkStep(step, `steps[${index}].`));
  if (new Set(steps.map((step) => step.episodeId)).size < steps.length) {
    throw invalidField("steps.episode_id", "each episode once");
  }
}

export function checkSplit(split: string | number): asserts split is "SPLIT_TRAIN" | "SPLIT_TEST" {
  if (split !== "SPLIT_TRAIN" && split !== "SPLIT_TEST") throw invalidField("split", "SPLIT_TRAIN or SPLIT_TEST");
}
