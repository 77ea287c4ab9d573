"""Evaluation, and infrastructure: inference, optimizers, stages, checkpoints, command line."""
