"""`fastdiff train`: the training package's own command."""

from fastdiff.training.command import add_arguments, main

__all__ = ["add_arguments", "main"]
