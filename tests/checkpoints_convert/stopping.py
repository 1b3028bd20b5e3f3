"""Conversions that are stopped on purpose, and what they leave."""


def contents(directory):
    """Every file below `directory` by its path there."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


class Stopped(BaseException):
    """As if the process ended here: nothing catches it."""
