"""Mulligan: gRPC services in which language agents learn by experience."""
