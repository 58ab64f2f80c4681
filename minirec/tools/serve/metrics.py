"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from minirec.continuous_batching import Engine, Request, Stage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SECONDS_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts of one server.  Times are the engine's: from `submit` to the first token, and between tokens."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("minirec_requests", "HTTP requests by outcome", ["outcome"], registry=registry)
        self.first = Histogram(
            "minirec_time_to_first_token_seconds", "Time to first token", buckets=SECONDS, registry=registry
        )
        self.per_token = Histogram(
            "minirec_time_per_output_token_seconds", "Time per output token after the first, by request",
            buckets=SECONDS_PER_TOKEN, registry=registry,
        )  # fmt: skip
        self.depth = Summary("minirec_token_depth_steps", "Recurrence steps of output tokens", registry=registry)
        self.registry.register(self)  # for what the engine itself counts

    def ended(self, request: Request) -> None:
        """A request of the engine has ended; called in the engine's thread."""
        times, depths = request.token_times, request.generation.depth
        if times:
            self.first.observe(times[0] - request.submitted)
        if len(times) > 1:
            self.per_token.observe((times[-1] - times[0]) / (len(times) - 1))
        for depth in depths:
            self.depth.observe(depth)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's own counts, as the library's registry asks for them."""
        engine = self.engine
        slots = len(engine.busy) + len(engine.free)
        yield GaugeMetricFamily("minirec_queue_length", "Requests that wait for a slot", len(engine.scheduler.waiting))
        yield GaugeMetricFamily("minirec_slots_busy", "Slots with a request", len(engine.busy))
        passes = CounterMetricFamily("minirec_passes", "Passes by kind", labels=["kind"])
        cells = CounterMetricFamily("minirec_cells", "Cells in all passes of a kind", labels=["kind"])
        share = GaugeMetricFamily(
            "minirec_pass_occupancy", "Mean share of the slots in a pass of a kind, since the start", labels=["kind"]
        )
        for stage in Stage:
            kind, n = [stage.name.lower()], engine.passes[stage]
            passes.add_metric(kind, n)
            cells.add_metric(kind, engine.cells[stage])
            share.add_metric(kind, engine.slots_in[stage] / (n * slots) if n else 0.0)
        yield from (passes, cells, share)

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        return generate_latest(self.registry)
