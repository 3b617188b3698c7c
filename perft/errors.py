"""What can be wrong with an adapter or a base, said to the user: what is wrong, where, and what to do about it."""


class PerftError(ValueError):
    """Root of the errors that a user of this project can cause and mend."""


class AdapterError(PerftError):
    """An adapter on disk is missing, broken, or does not fit the base model."""


class BaseModelError(PerftError):
    """A base model cannot be used: it has no Mixture-of-Experts blocks, or none that the method can wrap."""


def printable(text: str) -> str:
    """A text that every encoder takes: what a file's name holds of bytes that are no text is written as `\\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
