/** `npm run server`: an environment server. It says where it serves, and ends on SIGTERM or Ctrl-C. */

import { parseArgs } from "node:util";

import * as grpc from "@grpc/grpc-js";
import { HealthImplementation } from "grpc-health-check";

import { mulligan } from "../contracts.js";
import { Episodes } from "./episodes.js";
import { handlers } from "./service.js";

const SERVICE = "mulligan.env.v1.EnvService";

const { values: flags } = parseArgs({
  options: {
    address: { type: "string", default: "127.0.0.1:50051" },
    "max-episodes": { type: "string", default: "1024" },
    "lease-seconds": { type: "string", default: "600" },
  },
});
const leaseSeconds = Number(flags["lease-seconds"]);
const server = new grpc.Server({ "grpc.max_receive_message_length": 64 * 1024 * 1024 });
const health = new HealthImplementation({ "": "SERVING", [SERVICE]: "SERVING" });
health.addToServer(server);
server.addService(
  mulligan.env.v1.EnvService.service,
  handlers(new Episodes(Number(flags["max-episodes"]), leaseSeconds), leaseSeconds),
);

server.bindAsync(flags.address, grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) {
    console.error(`error: ${flags.address}: ${error.message}`);
    process.exit(1);
  }
  console.log(`serving ${flags.address.replace(/:\d+$/, "")}:${port}`);
});

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  process.once(signal, () => {
    for (const service of ["", SERVICE]) health.setStatus(service, "NOT_SERVING");
    server.tryShutdown(() => process.exit(0)); // once the calls under way have their answers
  });
}
