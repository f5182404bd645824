"""Errors that a caller may want to tell from others."""


class UnreachableError(ValueError):
    """A model cannot have what is asked for: a cost, or a method that goes by what it lacks."""
