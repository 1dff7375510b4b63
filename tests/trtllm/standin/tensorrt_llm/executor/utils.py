from tensorrt_llm.standin.flavour import since


class RequestError(RuntimeError):
    """One request went wrong."""


if since("1.3"):

    class EngineDeadError(RuntimeError):
        """The executor is gone."""
