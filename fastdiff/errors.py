"""The exceptions fastdiff raises on purpose."""


class InputError(ValueError):
    """An argument is not what was expected; the message names it and gives the remedy."""


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this call; the message says why."""


class CheckpointError(InputError):
    """A checkpoint file is missing, truncated, foreign, or does not fit the network."""
