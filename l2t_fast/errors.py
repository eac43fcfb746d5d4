"""The one exception that bad input raises, and the one of who was asked to stop."""


class L2TError(ValueError):
    """Bad input, said in one sentence: what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class UnfitError(L2TError):
    """The method cannot be had with these networks, though others can."""


class Interrupted(Exception):
    """Raised where the user asked to stop; everything is saved."""
