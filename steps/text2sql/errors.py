"""The error that a user can cause and mend."""


class UserError(Exception):
    """A problem of the user's input: the message names the parameter, the value and the way out.

    Steps print the message alone, without a traceback, and end with exit status 1.
    """
