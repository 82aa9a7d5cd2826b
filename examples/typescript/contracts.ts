/** The contracts: read from the `.proto` files when the program starts, typed by what `npm run generate` wrote. */

import { join } from "node:path";

import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

import type { ProtoGrpcType as Env } from "./gen/env_service.js";
import type { ProtoGrpcType as Errors } from "./gen/error.js";
import type { ProtoGrpcType as Policy } from "./gen/policy_service.js";
import type { ProtoGrpcType as Trainer } from "./gen/run_service.js";

const HERE = join(import.meta.dirname, ".."); // this file runs as dist/contracts.js
const CONTRACTS = process.env.PROTO ?? join(HERE, "../../proto");

const definition = loadSync(
  [
    "mulligan/env/v1/env_service.proto",
    "mulligan/policy/v1/policy_service.proto",
    "mulligan/trainer/v1/run_service.proto",
    "google/rpc/error.proto",
  ],
  // The options that `npm run generate` is given: the types hold for no others.
  { includeDirs: [CONTRACTS, join(HERE, "proto")], longs: Number, enums: String, defaults: true, oneofs: true },
);

export const { mulligan, google } = grpc.loadPackageDefinition(definition) as unknown as Env & Errors & Policy & Trainer;
