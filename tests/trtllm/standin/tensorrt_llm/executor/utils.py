class RequestError(RuntimeError):
    """One request went wrong."""


class EngineDeadError(RuntimeError):
    """The executor is gone."""
