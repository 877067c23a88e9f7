"""What ends a step and says how to go on: an error that a user can mend, or a signal."""


class UserError(Exception):
    """A problem of the user's input: the message names the parameter, the value and the way out.

    Steps print the message without a traceback, then `go_on`, which says how to go on once it is mended, and
    end with exit status 1.
    """

    def __init__(self, message: str, go_on: str = "") -> None:
        super().__init__(message)
        self.go_on = go_on


class Interrupted(Exception):
    """A signal, named by the message, stopped the step, and what was worth keeping is kept.

    `go_on` says how to go on.
    """

    def __init__(self, signal_name: str, go_on: str = "") -> None:
        super().__init__(signal_name)
        self.go_on = go_on
