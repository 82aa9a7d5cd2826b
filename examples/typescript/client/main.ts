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

where the services are: --env, --policy, --trainer HOST:PORT; --token TOKEN; --ca FILE (TLS)`;

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    env: { type: "string", default: "127.0.0.1:50051" },
    policy: { type: "string", default: "127.0.0.1:50052" },
    trainer: { type: "string", default: "127.0.0.1:50054" },
    token: { type: "string" },
    ca: { type: "string" },
    environment: { type: "string", default: "frozenlake-3x3" },
    task: { type: "string" },
    prompt: { type: "string", default: "Hello" },
    temperature: { type: "string", default: "1" },
    "max-tokens": { type: "string", default: "32" },
    "run-id": { type: "string", default: "from-typescript" },
    steps: { type: "string", default: "2" },
  },
});
const { environment, task } = flags;
const sampling = { temperature: Number(flags.temperature), maxTokens: Number(flags["max-tokens"]) };
const env = connect(mulligan.env.v1.EnvService, flags.env, flags);
const policy = connect(mulligan.policy.v1.PolicyService, flags.policy, flags);
const trainer = connect(mulligan.trainer.v1.RunService, flags.trainer, flags);

try {
  switch (positionals[0]) {
    case "play":
      await play(env, policy, { environment, task, ...sampling });
      break;
    case "stream":
      await stream(policy, { text: flags.prompt, ...sampling });
      break;
    case "train":
      process.exitCode = (await train(trainer, flags["run-id"], smallRun(environment, Number(flags.steps)))) ? 0 : 1;
      break;
    default:
      console.error(USAGE);
      process.exitCode = 2;
  }
} catch (error) {
  console.error(`error: ${explain(error)}`);
  process.exitCode = 1;
} finally {
  for (const client of [env, policy, trainer]) client.close();
}
