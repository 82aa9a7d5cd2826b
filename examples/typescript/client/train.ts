/** Starts a training run and watches it to its end. */

import { setTimeout } from "node:timers/promises";

import * as grpc from "@grpc/grpc-js";

import type { RunConfig } from "../gen/mulligan/trainer/v1/RunConfig.js";
import type { RunEvent__Output } from "../gen/mulligan/trainer/v1/RunEvent.js";
import type { RunServiceClient } from "../gen/mulligan/trainer/v1/RunService.js";
import { after, unary } from "./connect.js";
import { isServiceError } from "./errors.js";

const WATCH_SECONDS = 24 * 3600;

/** Small enough for the embedded model on a CPU; what is left out has the default that the contract names. */
export function smallRun(environment: string, steps: number): RunConfig {
  return {
    environment,
    steps,
    model: { source: "embedded" },
    rollout: { tasksPerStep: 4, rolloutsPerTask: 2, temperature: 1, maxTokens: 4, reflectionMaxTokens: 32 },
    loss: { klCoefficient: 0 },
    optimizer: { learningRate: 5e-4 },
    evaluation: { every: 0, tasks: 20, samples: 1 },
  };
}

/** Returns whether all steps were trained. A run that exists with the same settings is watched, not started again. */
export async function train(trainer: RunServiceClient, runId: string, config: RunConfig): Promise<boolean> {
  await unary(trainer.startRun.bind(trainer), { runId, config });
  console.log(`run ${runId}`);
  for await (const event of watch(trainer, runId)) console.log(describe(event));
  const { run } = await unary(trainer.getRun.bind(trainer), { runId });
  return run?.state === "RUN_STATE_COMPLETED";
}

/** All events until the run ends. A stream that breaks is taken up after the last event that came. */
async function* watch(trainer: RunServiceClient, runId: string): AsyncGenerator<RunEvent__Output> {
  let afterEvent = 0;
  for (;;) {
    try {
      for await (const { event } of trainer.watchRun({ runId, afterEvent }, { deadline: after(WATCH_SECONDS) })) {
        afterEvent = event.number;
        yield event;
      }
      return;
    } catch (error) {
      if (!isServiceError(error) || error.code !== grpc.status.UNAVAILABLE) throw error;
      await setTimeout(1000);
    }
  }
}

function describe({ event, stepCompleted, evaluationCompleted, stateChanged, notice }: RunEvent__Output): string {
  switch (event) {
    case "stepCompleted": {
      const { success_first, success_second } = stepCompleted!.metrics;
      return `step ${stepCompleted!.step}: first attempts ${share(success_first)}, second ${share(success_second)}`;
    }
    case "evaluationCompleted":
      return `evaluation after ${evaluationCompleted!.step} steps: ${share(evaluationCompleted!.success)}`;
    case "stateChanged":
      return `${stateChanged!.state} ${stateChanged!.error}`.trim();
    case "notice":
      return notice!.text;
    default:
      return `an event that this client does not know`; // from a newer server
  }
}

function share(value: number | undefined): string {
  return value === undefined ? "–" : value.toFixed(2);
}
