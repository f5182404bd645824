"""Errors that a caller may want to handle separately."""


class UnreachableError(ValueError):
    """The model cannot reach the cost that is asked for, or lacks what the method needs."""
