/** What a failed call says: a status code, and a reason of the contract in its details (google.rpc.ErrorInfo). */

import * as grpc from "@grpc/grpc-js";

import { google } from "../contracts.js";

const DETAILS = "grpc-status-details-bin";

export function isServiceError(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && "code" in error && "metadata" in error && "details" in error;
}

/** Such as `UNKNOWN_TASK`; empty where the error carries none. */
export function reasonOf(error: grpc.ServiceError): string {
  const [details] = error.metadata.get(DETAILS);
  if (!(details instanceof Buffer)) return "";
  for (const { type_url, value } of google.rpc.Status.deserialize(details).details) {
    if (type_url.endsWith("/google.rpc.ErrorInfo")) return google.rpc.ErrorInfo.deserialize(value).reason;
  }
  return "";
}

/** One line for a person: `UNKNOWN_TASK: no task "x" in "frozenlake-3x3"`. */
export function explain(error: unknown): string {
  if (!isServiceError(error)) return error instanceof Error ? error.message : String(error);
  return `${reasonOf(error) || grpc.status[error.code]}: ${error.details}`;
}
