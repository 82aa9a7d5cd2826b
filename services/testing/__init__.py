"""What tests and proofs of a system with Mulligan in it start and compare: service processes on loopback, the four of
them wired together, a real SGLang on the CPU, containers, a network with faults, weights as a trainer publishes them.

Parts need extras: `compose` testcontainers, `weights` and `agreement` torch.
"""
