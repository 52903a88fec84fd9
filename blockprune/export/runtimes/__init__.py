"""Pipelines outside PyTorch: each component as a program, in the formats of other runtimes, compared with the original there."""
