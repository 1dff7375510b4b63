"""What Prometheus is told. Names are the field's where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.life.job import Timeline
from gateway.life.worker import Worker

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
PHASES = (
    *("queue", "place", "reserve", "prefill_wait", "prefill"),
    *("exposed_transfer", "overlapped_transfer", "verify"),
)


class Metrics:
    """The gateway's metrics; `registry` is what `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "baton_requests", "Requests by route and HTTP status.", ("route", "status"),
            registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "baton_time_to_first_token_seconds", "From a request's arrival to its first token.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._total = Histogram(
            "baton_request_latency_seconds", "From arrival to last token, of answered requests.",
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._phases = Histogram(
            "baton_phase_seconds", "Time in each phase of a request.", ("phase",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._prompt = Counter(
            "baton_prompt_tokens", "Prompt tokens of answered requests.", registry=self.registry
        )
        self._cached = Counter(
            "baton_cached_prompt_tokens", "Prompt tokens whose KV did not have to be computed.",
            registry=self.registry,
        )  # fmt: skip
        self._present = Counter(
            "baton_present_prompt_tokens", "Prompt tokens whose KV did not have to be sent.",
            registry=self.registry,
        )  # fmt: skip
        self._generated = Counter(
            "baton_generation_tokens", "Tokens sent to clients.", registry=self.registry
        )
        self._retries = Counter(
            "baton_retries", "Times that a request was placed again.", registry=self.registry
        )

        self._answers: dict[tuple[str, int], Counter] = {}
        self._phase = {phase: self._phases.labels(phase) for phase in PHASES}

    def observe(
        self,
        route: str,
        status: int,
        timeline: Timeline | None,
        prompt_tokens: int,
        completion_tokens: int,
        seconds_to_first_token: float | None,
        total: float,
    ) -> None:
        """Count one request that has ended. `status` 499: its client left."""
        counter = self._answers.get((route, status))  # finding a labelled child is not cheap
        if counter is None:
            counter = self._answers[route, status] = self._requests.labels(route, str(status))
        counter.inc()
        self._prompt.inc(prompt_tokens)
        self._generated.inc(completion_tokens)
        if timeline is not None:
            self._total.observe(total)
        if seconds_to_first_token is not None:
            self._first.observe(seconds_to_first_token)
        if timeline is not None:
            if timeline.retries:
                self._retries.inc(timeline.retries)
            self._cached.inc(timeline.cached_tokens)
            self._present.inc(timeline.present_tokens)
            for phase, histogram in self._phase.items():
                seconds = getattr(timeline, phase)
                if seconds is not None:
                    histogram.observe(seconds)

    def watch(
        self, workers: Callable[[], Iterable[Worker]], gauges: dict[str, Callable[[], float]]
    ) -> None:
        """Show the workers' loads, and `gauges` (name to value), as they are when asked."""
        self.registry.register(_Live(workers, gauges))


class _Live(Collector):
    """Gauges that are read when somebody looks."""

    def __init__(
        self, workers: Callable[[], Iterable[Worker]], gauges: dict[str, Callable[[], float]]
    ) -> None:
        self._workers = workers
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        """What there is now."""
        for name, value in self._gauges.items():
            yield GaugeMetricFamily(
                f"baton_{name}", name.replace("_", " ").capitalize() + ".", value()
            )
        free = GaugeMetricFamily(
            "baton_worker_free_blocks", "Free blocks of each worker's pool.", labels=["worker"]
        )
        running = GaugeMetricFamily(
            "baton_worker_running", "Sequences that each worker decodes.", labels=["worker"]
        )
        waiting = GaugeMetricFamily(
            "baton_worker_waiting_tokens",
            "Prompt tokens that wait for prefill at each worker.",
            labels=["worker"],
        )
        emulated = GaugeMetricFamily(
            "baton_worker_emulated",
            "Workers whose timing is made up, and after which accelerator.",
            labels=["worker", "accelerator"],
        )
        for worker in self._workers():
            if worker.emulated:
                emulated.add_metric([worker.id, worker.emulated], 1)
            if worker.load is not None:
                free.add_metric([worker.id], worker.load.free_blocks)
                running.add_metric([worker.id], worker.load.running)
                waiting.add_metric([worker.id], worker.load.waiting_tokens)
        yield from (free, running, waiting, emulated)
