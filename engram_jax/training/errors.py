"""What stops a run through no fault of the program: said in one message, with what to do next."""


class RunError(RuntimeError):
    """A run that cannot go on or be continued; the message is all the user needs to read."""
