"""A package as others write it: a backend, an environment and a store, none of which Mulligan knows."""
