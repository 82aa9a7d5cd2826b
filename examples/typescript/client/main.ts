/** `npm run client -- play|stream|train`: see README.md. */

import { parseArgs } from "node:util";

import { mulligan } from "../contracts.js";
import { connect } from "./connect.js";
import { explain } from "./errors.js";
import { play } from "./play.js";
import { stream } from "./stream.js";
import { smallRun, train } from "./train.js";

const USAGE = `usage: npm run client -- COMMAND [FLAGS]

  play    play one episode     --environment NAME --task ID --temperature T --max-tokens N
  stream  stream a completion  --prompt TEXT --temperature T --max-tokens N
  train   start a run, watch   --run-id ID --environment NAME --steps N

where the services are: --env, --policy, --trainer HOST:PORT, or MULLIGAN_CLI_ENV, …; --ca FILE for TLS,
without which the token goes to no other machine, unless --insecure allows it
their token: MULLIGAN_CLI_TOKEN (a flag would show in the process list); that of your own mulligan up is found`;

const { MULLIGAN_CLI_ENV, MULLIGAN_CLI_POLICY, MULLIGAN_CLI_TRAINER, MULLIGAN_CLI_TOKEN } = process.env;

const OPTIONS = {
  env: { type: "string", default: MULLIGAN_CLI_ENV ?? "127.0.0.1:50051" },
  policy: { type: "string", default: MULLIGAN_CLI_POLICY ?? "127.0.0.1:50052" },
  trainer: { type: "string", default: MULLIGAN_CLI_TRAINER ?? "127.0.0.1:50054" },
  ca: { type: "string" },
  insecure: { type: "boolean", default: false },
  environment: { type: "string", default: "frozenlake-3x3" },
  task: { type: "string" },
  prompt: { type: "string", default: "Hello" },
  temperature: { type: "string", default: "1" },
  "max-tokens": { type: "string", default: "32" },
  "run-id": { type: "string", default: "from-typescript" },
  steps: { type: "string", default: "2" },
} as const;

async function main(): Promise<number> {
  const { values: flags, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true });
  const { environment, task } = flags;
  const sampling = { temperature: Number(flags.temperature), maxTokens: Number(flags["max-tokens"]) };
  const security = { token: MULLIGAN_CLI_TOKEN, ca: flags.ca, insecure: flags.insecure };
  const env = connect(mulligan.env.v1.EnvService, flags.env, security);
  const policy = connect(mulligan.policy.v1.PolicyService, flags.policy, security);
  const trainer = connect(mulligan.trainer.v1.RunService, flags.trainer, security);
  try {
    switch (positionals[0]) {
      case "play":
        await play(env, policy, { environment, task, ...sampling });
        return 0;
      case "stream":
        await stream(policy, { text: flags.prompt, ...sampling });
        return 0;
      case "train":
        return (await train(trainer, flags["run-id"], smallRun(environment, Number(flags.steps)))) ? 0 : 1;
      default:
        console.error(USAGE);
        return 2;
    }
  } finally {
    for (const client of [env, policy, trainer]) client.close();
  }
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(`error: ${explain(error)}`);
  process.exitCode = 1;
}
