/** EnvService on the wire: requests checked, the episode table asked, answers and errors sent. */

import type { sendUnaryData, ServerUnaryCall } from "@grpc/grpc-js";
import { status } from "@grpc/grpc-js";

import type { EnvServiceHandlers } from "../gen/mulligan/env/v1/EnvService.js";
import type { ListTasksRequest__Output } from "../gen/mulligan/env/v1/ListTasksRequest.js";
import type { ListTasksResponse } from "../gen/mulligan/env/v1/ListTasksResponse.js";
import { checkEnvironment, Episodes } from "./episodes.js";
import { ContractError, invalidField, toStatus } from "./errors.js";
import { INFO, TASK_COUNTS } from "./game.js";
import { checkId, checkRange, checkSplit, checkStart, checkStarts, checkStep, checkSteps, type Start } from "./requests.js";

export function handlers(episodes: Episodes, leaseSeconds: number): EnvServiceHandlers {
  const lease = { seconds: Math.floor(leaseSeconds), nanos: Math.round((leaseSeconds % 1) * 1e9) };
  const start = ({ episodeId, environment, taskId }: Start) => ({
    observation: episodes.start(episodeId, environment, taskId),
    lease,
  });
  return {
    ListEnvironments: unary(() => ({ environments: [INFO] })),
    ListTasks: unary(listTasks),
    StartEpisode: unary((request) => {
      checkStart(request);
      return start(request);
    }),
    // Starts and steps take no time here, so that none is ever pending, whatever max_wait is.
    StartEpisodes: unary(({ starts, maxWait }) => {
      checkStarts(starts);
      checkWait(maxWait);
      return { items: starts.map((one) => orError(() => ({ episode: start(one) }))) };
    }),
    StepEpisode: unary((request) => {
      checkStep(request);
      return episodes.step(request);
    }),
    StepEpisodes: unary(({ steps, maxWait }) => {
      checkSteps(steps);
      checkWait(maxWait);
      return { items: steps.map((step) => orError(() => ({ step: episodes.step(step) }))) };
    }),
    ForkEpisode: unary(({ episodeId, stepIndex, newEpisodeId }) => {
      checkId("episode_id", episodeId);
      checkRange("step_index", stepIndex, 0, 2 ** 31 - 1);
      checkId("new_episode_id", newEpisodeId);
      return { observation: episodes.fork(episodeId, stepIndex, newEpisodeId), lease };
    }),
    EndEpisode: unary(({ episodeId }) => {
      checkId("episode_id", episodeId);
      episodes.end(episodeId);
      return {};
    }),
  };
}

/** A handler that answers with what the function returns or throws. */
function unary<Request, Response>(answer: (request: Request) => Response) {
  return (call: ServerUnaryCall<Request, Response>, send: sendUnaryData<Response>): void => {
    try {
      send(null, answer(call.request));
    } catch (error) {
      send(toStatus(error));
    }
  };
}

function listTasks({ environment, split, pageSize, pageToken }: ListTasksRequest__Output): ListTasksResponse {
  checkId("environment", environment);
  checkSplit(split);
  checkRange("page_size", pageSize, 0, 1000);
  if (pageToken.length > 1000) throw invalidField("page_token", "at most 1000 characters");
  checkEnvironment(environment);
  const name = split === "SPLIT_TRAIN" ? "train" : "test";
  const count = TASK_COUNTS[name];
  const start = pageToken ? position(pageToken, name, count) : 0;
  const end = Math.min(start + (pageSize || 100), count);
  const tasks = [];
  for (let index = start; index < end; index++) tasks.push({ taskId: `${name}/${index}`, split, difficulty: 1 });
  return { tasks, nextPageToken: end < count ? `${name}:${end}` : "" };
}

/** A page token names the listing that it belongs to, and where the next page begins. */
function position(token: string, name: string, count: number): number {
  const [, listing, digits] = /^(\w+):([1-9]\d*)$/.exec(token) ?? [];
  if (listing === name && Number(digits) < count) return Number(digits);
  throw new ContractError(status.INVALID_ARGUMENT, "BAD_PAGE_TOKEN", "page_token is not one of this listing");
}

/** The item of a call for several: what the function returns, or the error that it throws. */
function orError<Result>(answer: () => Result) {
  try {
    return answer();
  } catch (error) {
    if (!(error instanceof ContractError)) throw error;
    const { code, reason, message, metadata } = error;
    return { error: { code, reason, message, metadata } };
  }
}

function checkWait(maxWait: { seconds: number; nanos: number } | null): void {
  if (maxWait) checkRange("max_wait", maxWait.seconds + maxWait.nanos / 1e9, 0, 3600);
}
