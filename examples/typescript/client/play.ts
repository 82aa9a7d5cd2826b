/** Plays one episode: observations from the environment service, actions from the policy service. */

import { randomUUID } from "node:crypto";

import type { Message } from "../gen/mulligan/common/v1/Message.js";
import type { Tool } from "../gen/mulligan/common/v1/Tool.js";
import type { EnvServiceClient } from "../gen/mulligan/env/v1/EnvService.js";
import type { GenerateRequest } from "../gen/mulligan/policy/v1/GenerateRequest.js";
import type { PolicyServiceClient } from "../gen/mulligan/policy/v1/PolicyService.js";
import { unary } from "./connect.js";

export interface Episode {
  environment: string;
  /** The first task of the test split when empty. */
  task?: string;
  temperature: number;
  maxTokens: number;
}

/** Returns the sum of the rewards. */
export async function play(env: EnvServiceClient, policy: PolicyServiceClient, options: Episode): Promise<number> {
  const { environments } = await unary(env.listEnvironments.bind(env), {});
  const info = environments.find(({ name }) => name === options.environment);
  if (!info) throw new Error(`no environment ${options.environment}; there are: ${environments.map((e) => e.name).join(", ")}`);
  const task = options.task || (await firstTestTask(env, options.environment));
  const tools = info.tools.length > 0 ? info.tools : undefined;
  const speaker = new Speaker(policy, await takesTokens(policy), options, tools);

  const episodeId = randomUUID();
  const start = await unary(env.startEpisode.bind(env), { episodeId, environment: options.environment, taskId: task });
  console.log(`episode ${episodeId} of ${task}\n${start.observation}`);
  const messages: Message[] = [
    { role: "ROLE_SYSTEM", content: info.prompts?.solver },
    { role: "ROLE_USER", content: start.observation },
  ];
  let rewards = 0;
  try {
    for (let stepIndex = 0; stepIndex < info.maxSteps; stepIndex++) {
      const action = await speaker.answer(messages, episodeId);
      const step = await unary(env.stepEpisode.bind(env), { episodeId, stepIndex, action });
      rewards += step.reward ?? 0;
      console.log(`> ${step.action}\n${step.observation}`);
      messages.push({ role: "ROLE_ASSISTANT", content: action });
      messages.push({ role: step.tool ? "ROLE_TOOL" : "ROLE_USER", name: step.tool, content: step.observation });
      if (step.done) {
        console.log(`${step.outcome}: ${step.feedback || step.error}\nreward ${rewards}`);
        break;
      }
    }
  } finally {
    await unary(env.endEpisode.bind(env), { episodeId });
  }
  return rewards;
}

async function firstTestTask(env: EnvServiceClient, environment: string): Promise<string> {
  const { tasks } = await unary(env.listTasks.bind(env), { environment, split: "SPLIT_TEST", pageSize: 1 });
  if (!tasks[0]) throw new Error(`${environment} has no test tasks`);
  return tasks[0].taskId;
}

/** Whether a conversation can go on from its tokens; otherwise each turn is prompted with all messages. */
async function takesTokens(policy: PolicyServiceClient): Promise<boolean> {
  const { policy: info } = await unary(policy.getPolicy.bind(policy), {});
  return !!info && info.features.includes("FEATURE_TOKEN_IDS") && !info.rewritesHistory;
}

/** One conversation with the policy. What was sampled stays as it was: tokens are appended, never encoded again. */
class Speaker {
  private tokens: number[] = [];
  private turnClosed = false;

  constructor(
    private readonly policy: PolicyServiceClient,
    private readonly byTokens: boolean,
    private readonly options: Episode,
    private readonly tools?: Tool[],
  ) {}

  async answer(messages: Message[], sessionId: string): Promise<string> {
    const request: GenerateRequest = {
      requestId: `${sessionId}-${messages.length}`,
      sessionId, // the same engine, and the same model, for the whole conversation
      sampling: { temperature: this.options.temperature, maxTokens: this.options.maxTokens },
    };
    if (this.tokens.length > 0) {
      request.continuation = { tokenIds: this.tokens, turnClosed: this.turnClosed, messages: messages.slice(-1) };
    } else {
      request.messages = { messages };
      request.tools = this.tools; // the chat template shows them; later turns go on from its tokens
    }
    const response = await unary(this.policy.generate.bind(this.policy), request);
    const completion = response.completions[0]!;
    if (this.byTokens) this.tokens.push(...response.promptTokenIds, ...completion.tokenIds);
    this.turnClosed = completion.stopReason === "STOP_REASON_END_OF_TURN";
    return completion.text;
  }
}
