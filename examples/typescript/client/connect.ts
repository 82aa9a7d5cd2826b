/** Channels, deadlines and credentials; unary calls as promises. */

import { readFileSync } from "node:fs";
import { isIPv4 } from "node:net";
import { homedir, hostname } from "node:os";
import { join } from "node:path";

import * as grpc from "@grpc/grpc-js";

export interface Options {
  /** Sent as `authorization: Bearer TOKEN`. Without it, that of this user's `mulligan up` at the address, if any. */
  token?: string;
  /** File with the certificate authority of a server with TLS; without it the connection is not encrypted. */
  ca?: string;
  /** Lets the token go to another machine without TLS, where others could read it on its way. */
  insecure?: boolean;
}

const CALL_SECONDS = 60;

// UNAVAILABLE means "repeat the call"; the contracts say of each call that it may be repeated.
const RETRIES = JSON.stringify({
  methodConfig: [
    {
      name: [{}],
      retryPolicy: {
        maxAttempts: 5,
        initialBackoff: "0.2s",
        maxBackoff: "5s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
});

/** `connect(mulligan.env.v1.EnvService, "127.0.0.1:50051")` is a client of it. */
export function connect<Client extends grpc.Client>(
  Service: new (...parameters: ConstructorParameters<typeof grpc.Client>) => Client,
  address: string,
  { token = localToken(address), ca, insecure = false }: Options = {},
): Client {
  if (token && !ca && !insecure && !isLocal(address)) {
    throw new Error(`the token for ${address} would cross the network without TLS: expected --ca FILE, or --insecure`);
  }
  const credentials = ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure();
  return new Service(address, credentials, { interceptors: [prepare(token)], "grpc.service_config": RETRIES });
}

/** Whether only this machine can be at the address. */
function isLocal(address: string): boolean {
  const host = address.slice(0, address.lastIndexOf(":"));
  return host === "localhost" || host === "[::1]" || (isIPv4(host) && host.startsWith("127."));
}

/**
 * The token that `mulligan up` made for services at an address of this machine. As long as they run, a file that their
 * user alone can read has two lines: the process that started them, and the folder with a file for each role.
 */
function localToken(address: string, role = "trainer"): string | undefined {
  if (!address.startsWith("127.0.0.1:")) return undefined;
  const state = process.env.XDG_STATE_HOME || join(homedir(), ".local", "state");
  try {
    const found = readFileSync(join(state, "mulligan", "services", hostname(), address), "utf8");
    const [pid = "", folder = ""] = found.split("\n");
    process.kill(Number(pid), 0); // throws if it was killed: another user's program may listen there by now
    return readFileSync(join(folder, role), "utf8").split("\n")[0];
  } catch {
    return undefined;
  }
}

/** Gives every call the token, and a deadline where it has none. */
function prepare(token?: string): grpc.Interceptor {
  return (options, next) =>
    new grpc.InterceptingCall(next({ ...options, deadline: options.deadline ?? after(CALL_SECONDS) }), {
      start(metadata, listener, start) {
        if (token) metadata.set("authorization", `Bearer ${token}`);
        start(metadata, listener);
      },
    });
}

export function after(seconds: number): Date {
  return new Date(Date.now() + seconds * 1000);
}

/** `await unary(env.endEpisode.bind(env), { episodeId })`: the answer, or the error thrown. */
export function unary<Request, Response>(
  method: (request: Request, answer: grpc.requestCallback<Response>) => grpc.ClientUnaryCall,
  request: Request,
): Promise<Response> {
  return new Promise((resolve, reject) => {
    method(request, (error, response) => (error ? reject(error) : resolve(response!)));
  });
}
