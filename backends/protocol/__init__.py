"""The control connection between a gateway and a worker.

`messages.py` has what is said, `request.py` about what, `greeting.py` how it begins, `link.py` how
it travels, and `address.py` where to. This is all that the gateway knows of `backends`.
"""

from backends.chain import chain as chain
from backends.chain import mark as mark
from backends.chain import unpack as unpack
from backends.protocol.address import (
    join_address as join_address,
)
from backends.protocol.address import (
    split_address as split_address,
)
from backends.protocol.greeting import (
    CACHES as CACHES,
)
from backends.protocol.greeting import (
    DRAINS as DRAINS,
)
from backends.protocol.greeting import (
    KEEPS as KEEPS,
)
from backends.protocol.greeting import (
    LOWEST as LOWEST,
)
from backends.protocol.greeting import (
    VERSION as VERSION,
)
from backends.protocol.greeting import (
    Caller as Caller,
)
from backends.protocol.greeting import (
    Door as Door,
)
from backends.protocol.link import (
    LENGTH as LENGTH,
)
from backends.protocol.link import (
    MAX_FRAME_BYTES as MAX_FRAME_BYTES,
)
from backends.protocol.link import (
    MAX_STRANGER_BYTES as MAX_STRANGER_BYTES,
)
from backends.protocol.link import (
    UNREADABLE as UNREADABLE,
)
from backends.protocol.link import (
    Link as Link,
)
from backends.protocol.link import (
    frame as frame,
)
from backends.protocol.messages import (
    FENCED as FENCED,
)
from backends.protocol.messages import (
    MOST_MARKS as MOST_MARKS,
)
from backends.protocol.messages import (
    Adopt as Adopt,
)
from backends.protocol.messages import (
    Adopted as Adopted,
)
from backends.protocol.messages import (
    BackendInfo as BackendInfo,
)
from backends.protocol.messages import (
    Cached as Cached,
)
from backends.protocol.messages import (
    Cancel as Cancel,
)
from backends.protocol.messages import (
    Challenge as Challenge,
)
from backends.protocol.messages import (
    Disown as Disown,
)
from backends.protocol.messages import (
    Drain as Drain,
)
from backends.protocol.messages import (
    Failed as Failed,
)
from backends.protocol.messages import (
    FinishReason as FinishReason,
)
from backends.protocol.messages import (
    First as First,
)
from backends.protocol.messages import (
    FirstToken as FirstToken,
)
from backends.protocol.messages import (
    Flow as Flow,
)
from backends.protocol.messages import (
    Granted as Granted,
)
from backends.protocol.messages import (
    HandedOver as HandedOver,
)
from backends.protocol.messages import (
    Hello as Hello,
)
from backends.protocol.messages import (
    Inspect as Inspect,
)
from backends.protocol.messages import (
    Landed as Landed,
)
from backends.protocol.messages import (
    Landing as Landing,
)
from backends.protocol.messages import (
    Ledger as Ledger,
)
from backends.protocol.messages import (
    Load as Load,
)
from backends.protocol.messages import (
    Logprob as Logprob,
)
from backends.protocol.messages import (
    Meet as Meet,
)
from backends.protocol.messages import (
    Message as Message,
)
from backends.protocol.messages import (
    Met as Met,
)
from backends.protocol.messages import (
    Part as Part,
)
from backends.protocol.messages import (
    Phase as Phase,
)
from backends.protocol.messages import (
    Prefill as Prefill,
)
from backends.protocol.messages import (
    Proof as Proof,
)
from backends.protocol.messages import (
    Refused as Refused,
)
from backends.protocol.messages import (
    Rejected as Rejected,
)
from backends.protocol.messages import (
    Reserve as Reserve,
)
from backends.protocol.messages import (
    Role as Role,
)
from backends.protocol.messages import (
    Sampling as Sampling,
)
from backends.protocol.messages import (
    Stage as Stage,
)
from backends.protocol.messages import (
    ToGateway as ToGateway,
)
from backends.protocol.messages import (
    Token as Token,
)
from backends.protocol.messages import (
    Tokens as Tokens,
)
from backends.protocol.messages import (
    ToWorker as ToWorker,
)
from backends.protocol.messages import (
    Welcome as Welcome,
)
from backends.protocol.request import (
    RequestSpec as RequestSpec,
)
from backends.protocol.request import (
    SequenceSpec as SequenceSpec,
)
from backends.protocol.request import (
    TokenIds as TokenIds,
)
