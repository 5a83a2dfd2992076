"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llm2comp.use.serve.engine import Text

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Figures of one server, in a registry of its own. Counters begin at 0 with the server.

    Args:
        waiting: how many tokens wait now.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "llm2comp_requests", "Requests answered.", ("route", "status"), registry=registry
        )
        self._seconds = Histogram(
            "llm2comp_request_seconds",
            "From a request's arrival to its answer.",
            ("route",),
            registry=registry,
            buckets=SECONDS,
        )
        self._tokens = Counter("llm2comp_tokens", "Tokens read.", registry=registry)
        self._texts = Counter("llm2comp_texts", "Texts read.", registry=registry)
        self._cut = Counter("llm2comp_texts_cut", "Texts over the limit.", registry=registry)
        self._batch = Histogram(
            "llm2comp_batch_texts", "Texts in a batch.", registry=registry, buckets=TEXTS
        )
        self._busy = Counter("llm2comp_model_seconds", "Time in the model.", registry=registry)
        gauge = Gauge("llm2comp_waiting_tokens", "Tokens that wait.", registry=registry)
        gauge.set_function(waiting)

    def read(self, texts: Sequence[Text]) -> None:
        """Texts were answered."""
        self._texts.inc(len(texts))
        self._tokens.inc(sum(text.tokens for text in texts))
        self._cut.inc(sum(bool(text.cut) for text in texts))

    def batch(self, texts: int, tokens: int, seconds: float) -> None:
        """A batch was computed."""
        self._batch.observe(texts)
        self._busy.inc(seconds)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
