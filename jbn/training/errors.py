"""Errors that end a run with a message for the person who started it."""


class UsageError(Exception):
    """The run cannot start: the message says why, and what to do."""


class NonFiniteLossError(Exception):
    """The loss became infinite or not a number: the message names the step."""


class StorageError(Exception):
    """The folder of a run is no longer writable: the message says what is saved."""


def one_line(error: BaseException) -> str:
    """The message of an error that a library or a user's code raised, on one line."""
    return " ".join(str(error).split())
