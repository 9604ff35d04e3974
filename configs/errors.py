"""Errors that the person who started the program can put right: one line, exit status 2. All others are bugs."""

MOST_SAID = 2000  # characters of an error


class UserError(ValueError):
    """What was given, what is allowed and what to do, in one short line."""


class FileError(OSError):
    """The same about a file or a folder. No ValueError: a server that does not answer has not sent damaged data."""


class MissingFileError(FileError, FileNotFoundError):
    """The same about one that is not there."""


class FileInTheWayError(FileError, FileExistsError):
    """The same about one that is there already."""


class RefusedError(FileError, PermissionError):
    """The same about one that may not be read or written."""


def is_users(error: BaseException) -> bool:
    """Whether the user can put it right: one of ours, or what the operating system says about a file by its name."""
    return isinstance(error, UserError | FileError) or (isinstance(error, OSError) and error.filename is not None)


def one_line(error: BaseException) -> str:
    """An error as one line: what happened, without line breaks; of what quotes a whole file the two ends."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MOST_SAID else f"{said[: MOST_SAID // 2]} ... {said[-MOST_SAID // 2 :]}"
