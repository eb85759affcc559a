"""How a run ends before its last step."""


class Stopped(RuntimeError):
    """A run that ended early, in order: what happened and what to do is the message, `code` the exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
