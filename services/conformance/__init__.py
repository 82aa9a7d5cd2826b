"""Whether an implementation in any language keeps what the contracts in `proto/` promise: `mulligan conformance`."""
