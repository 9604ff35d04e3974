"""Errors that the user can fix: one line, exit status 2. All others are bugs, and keep their traceback."""

LONGEST = 2000  # characters of an error


class UserError(ValueError):
    """Says in one short line what was given, what is allowed and what to do."""


class FileError(OSError):
    """A user's error about a file. Not a ValueError: a server that does not answer has not sent damaged data."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder is not there."""


class FileInTheWayError(FileError, FileExistsError):
    """A file or folder is there already."""


class RefusedError(FileError, PermissionError):
    """A file or folder may not be read or written."""


def is_users(error: BaseException) -> bool:
    """Whether the user can fix it: an error of ours, or the operating system's about a file that it names."""
    return isinstance(error, UserError | FileError) or (isinstance(error, OSError) and error.filename is not None)


def one_line(error: BaseException) -> str:
    """The error without line breaks; if it is very long, its beginning and its end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
