/** The episode table: exactly-once steps, leases, capacity. All of it runs on one thread, so a step is never half done. */

import { status } from "@grpc/grpc-js";

import type { StepEpisodeResponse } from "../gen/mulligan/env/v1/StepEpisodeResponse.js";
import { ContractError } from "./errors.js";
import { FIRST_OBSERVATION, INFO, isTask, play } from "./game.js";
import type { Step } from "./requests.js";

const REMEMBERED = 10_000; // ids of expired episodes

interface Episode {
  taskId: string;
  /** What it is a fork of, as `episode@step`; empty for one that was started. */
  source: string;
  actions: string[];
  answers: StepEpisodeResponse[];
  touched: number;
}

export class Episodes {
  /** Longest untouched first. Those that are over stay, for repeated calls, until they are ended or expire. */
  private readonly episodes = new Map<string, Episode>();
  private readonly expired = new Set<string>();

  constructor(
    private readonly capacity: number,
    private readonly leaseSeconds: number,
  ) {}

  /** The first observation. */
  start(id: string, environment: string, taskId: string): string {
    const episode = this.find(id);
    if (episode) {
      if (episode.source || environment !== INFO.name || episode.taskId !== taskId) throw inUse(id);
      return FIRST_OBSERVATION;
    }
    checkEnvironment(environment);
    if (!isTask(taskId)) throw new ContractError(status.NOT_FOUND, "UNKNOWN_TASK", `no task ${quoted(taskId)}`);
    this.add(id, { taskId, source: "", actions: [], answers: [], touched: Date.now() });
    return FIRST_OBSERVATION;
  }

  step({ episodeId, stepIndex, action }: Step): StepEpisodeResponse {
    const episode = this.known(episodeId);
    const { actions, answers } = episode;
    if (stepIndex < answers.length) {
      if (actions[stepIndex] !== action) {
        throw refused("STEP_CONFLICT", `step ${stepIndex} of ${quoted(episodeId)} was played with another action`);
      }
      return answers[stepIndex]!;
    }
    if (isOver(episode)) throw refused("EPISODE_FINISHED", `${quoted(episodeId)} is over`);
    if (stepIndex > answers.length) throw skipped(episodeId, answers.length);
    const answer = play(episode.taskId, answers.length, action);
    actions.push(action);
    answers.push(answer);
    return answer;
  }

  /** The last observation of the episode, whose copy has the new id. */
  fork(id: string, stepIndex: number, newId: string): string {
    const source = `${id}@${stepIndex}`;
    const copy = this.find(newId);
    if (copy) {
      if (copy.source !== source) throw inUse(newId);
      return observationAfter(copy, stepIndex);
    }
    const episode = this.known(id);
    const played = episode.answers.length;
    if (isOver(episode)) throw refused("EPISODE_FINISHED", `${quoted(id)} is over`);
    if (stepIndex > played) throw skipped(id, played);
    if (stepIndex < played) throw refused("STEP_CONFLICT", `${quoted(id)} has played ${played} steps`);
    const { taskId, actions, answers } = episode;
    this.add(newId, { taskId, source, actions: [...actions], answers: [...answers], touched: Date.now() });
    return observationAfter(episode, stepIndex);
  }

  end(id: string): void {
    this.episodes.delete(id);
  }

  private add(id: string, episode: Episode): void {
    const live = [...this.episodes.values()].filter((other) => !isOver(other)).length;
    if (live >= this.capacity) {
      const message = `${live} episodes are live, as many as this server takes`;
      throw new ContractError(status.RESOURCE_EXHAUSTED, "CAPACITY_REACHED", message, {}, 1);
    }
    this.episodes.set(id, episode);
    this.expired.delete(id);
  }

  /** The episode, whose lease begins anew. */
  private find(id: string): Episode | undefined {
    this.expire();
    const episode = this.episodes.get(id);
    if (episode) {
      episode.touched = Date.now();
      this.episodes.delete(id);
      this.episodes.set(id, episode);
    }
    return episode;
  }

  private known(id: string): Episode {
    const episode = this.find(id);
    if (episode) return episode;
    if (this.expired.has(id)) {
      const message = `${quoted(id)} was idle for longer than its lease of ${this.leaseSeconds} s`;
      throw new ContractError(status.NOT_FOUND, "EPISODE_EXPIRED", message);
    }
    throw new ContractError(status.NOT_FOUND, "UNKNOWN_EPISODE", `no episode ${quoted(id)}`);
  }

  private expire(): void {
    const latest = Date.now() - this.leaseSeconds * 1000;
    for (const [id, episode] of this.episodes) {
      if (episode.touched >= latest) break;
      this.episodes.delete(id);
      this.expired.add(id);
    }
    for (const id of this.expired) {
      if (this.expired.size <= REMEMBERED) break;
      this.expired.delete(id);
    }
  }
}

export function checkEnvironment(name: string): void {
  if (name === INFO.name) return;
  throw new ContractError(status.NOT_FOUND, "UNKNOWN_ENVIRONMENT", `no environment ${quoted(name)}; there is: ${INFO.name}`);
}

function isOver(episode: Episode): boolean {
  return !!episode.answers.at(-1)?.done;
}

function observationAfter(episode: Episode, steps: number): string {
  return steps > 0 ? episode.answers[steps - 1]!.observation! : FIRST_OBSERVATION;
}

function inUse(id: string): ContractError {
  return new ContractError(status.ALREADY_EXISTS, "EPISODE_CONFLICT", `${quoted(id)} is in use for something else`);
}

function refused(reason: string, message: string, metadata: Record<string, string> = {}): ContractError {
  return new ContractError(status.FAILED_PRECONDITION, reason, message, metadata);
}

function skipped(id: string, next: number): ContractError {
  return refused("STEP_SKIPPED", `the next step of ${quoted(id)} is ${next}`, { next_step_index: String(next) });
}

function quoted(id: string): string {
  return JSON.stringify(id);
}
