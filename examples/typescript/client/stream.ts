/** Streams a completion, token by token. */

import type { PolicyServiceClient } from "../gen/mulligan/policy/v1/PolicyService.js";
import { after } from "./connect.js";

export interface Prompt {
  text: string;
  temperature: number;
  maxTokens: number;
}

const STREAM_SECONDS = 300;

export async function stream(policy: PolicyServiceClient, { text, temperature, maxTokens }: Prompt): Promise<void> {
  const request = {
    messages: { messages: [{ role: "ROLE_USER" as const, content: text }] },
    sampling: { temperature, maxTokens },
  };
  let count = 0;
  for await (const piece of policy.streamGenerate({ request }, { deadline: after(STREAM_SECONDS) })) {
    process.stdout.write(piece.text);
    count += piece.tokenIds.length;
    if (piece.stopReason !== "STOP_REASON_UNSPECIFIED") console.log(`\n${count} tokens, ${piece.stopReason}`);
  }
}
