"""Errors that end a run with a message for the person who started it."""


class UsageError(Exception):
    """The run cannot start as asked: the message says why and what to do."""


class NonFiniteLossError(Exception):
    """The loss became infinite or not a number: the message names the step."""


class StorageError(Exception):
    """The folder of a run cannot be written any more: the message says what is left."""
