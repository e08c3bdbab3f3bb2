"""Errors that a user's own mistake raises. Commands print their one line and exit with code 2."""


class MuseError(Exception):
    """Base of all errors whose message alone tells the user what to change."""


class ConfigError(MuseError, ValueError):
    """A configuration key is unknown, of a wrong type, or impossible beside another one."""


class CheckpointError(MuseError):
    """A checkpoint is missing, unreadable, or does not fit the model."""


class DataError(MuseError):
    """An input file, shard, label or caption is missing or unreadable."""
