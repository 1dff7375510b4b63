"""Where 1.2 keeps the connector's contract; later releases have moved it."""

from tensorrt_llm.standin.flavour import since

if since("1.3"):
    raise ModuleNotFoundError(
        f"No module named {__name__!r}; it has moved to connectors", name=__name__
    )

from tensorrt_llm.standin.connector_api import (
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    RequestData,
    SchedulerOutput,
)

__all__ = ["KvCacheConnectorScheduler", "KvCacheConnectorWorker", "RequestData", "SchedulerOutput"]
