"""What can go wrong while a cache is moved. The prompt can always be prefilled again."""


class TransferError(Exception):
    """A cache could not be moved. Prefilling again, perhaps elsewhere, always helps."""


class LayoutMismatch(TransferError):
    """The two pools cannot be converted into each other. A configuration fault: never retried."""


class LandingGone(TransferError):
    """The landing expired, was cancelled, was used already, or its worker restarted."""


class DigestMismatch(TransferError):
    """What lies in the target pool is not what was sent. The landing is freed; prefill again."""


class KeptChanged(DigestMismatch):
    """What the target had already is not what it was; `block`, by its place there, is the first.

    Not the sender's fault: whoever kept it must forget it.
    """

    def __init__(self, message: str, block: int = 0) -> None:
        super().__init__(message)
        self.block = block


class PeerLost(TransferError):
    """The connection to the other worker broke, or was never there."""


class PeerMisbehaved(TransferError):
    """The other side sent bytes that the protocol does not allow. Its connection is closed."""
