/** The contract's errors: a status code with a google.rpc.ErrorInfo in its details. */

import * as grpc from "@grpc/grpc-js";

import { google } from "../contracts.js";

export class ContractError extends Error {
  constructor(
    readonly code: grpc.status,
    readonly reason: string,
    message: string,
    readonly metadata: Record<string, string> = {},
    readonly retrySeconds?: number,
  ) {
    super(message);
  }
}

export function invalidField(field: string, expected: string): ContractError {
  const message = `${field}: expected ${expected}`;
  return new ContractError(grpc.status.INVALID_ARGUMENT, "INVALID_FIELD", message, { field, expected });
}

/** As gRPC sends it; `grpc-status-details-bin` holds the details. Whatever is not of the contract is INTERNAL. */
export function toStatus(error: unknown): Partial<grpc.StatusObject> {
  if (!(error instanceof ContractError)) {
    console.error(error);
    return { code: grpc.status.INTERNAL, details: "a fault of the server" };
  }
  const { ErrorInfo, RetryInfo, Status } = google.rpc;
  const { code, reason, message, metadata, retrySeconds } = error;
  const details = [any("ErrorInfo", ErrorInfo.serialize({ reason, domain: "mulligan", metadata }))];
  if (retrySeconds !== undefined) {
    details.push(any("RetryInfo", RetryInfo.serialize({ retryDelay: { seconds: retrySeconds } })));
  }
  const trailers = new grpc.Metadata();
  trailers.set("grpc-status-details-bin", Status.serialize({ code, message, details }));
  return { code, details: message, metadata: trailers };
}

function any(name: string, value: Buffer) {
  return { type_url: `type.googleapis.com/google.rpc.${name}`, value };
}
