"""What can go wrong in a worker."""


class BackendError(Exception):
    """A worker or its backend could not do what was asked."""


class BackendNotFound(BackendError):
    """No plug-in of that name is installed. A configuration fault; lists the names there are."""


class BackendMisconfigured(BackendError):
    """The plug-in refuses its options; says which one. A configuration fault: never retried."""


class StepFailed(BackendError):
    """The engine raised inside a step. Every sequence of that batch is lost; prefill again."""


class PoolExhausted(BackendError):
    """Not enough free blocks. Waiting, or another worker, helps."""


class ProtocolError(BackendError):
    """The other end of a control connection does not speak our protocol. It is disconnected."""
