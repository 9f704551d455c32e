"""What Prometheus may ask."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("flexgen_requests", "Requests by route and status", ["route", "status"], registry=own)
        self.prompt_tokens = Counter("flexgen_prompt_tokens", "Tokens of prompts that were answered", registry=own)
        self.kept_tokens = Counter(
            "flexgen_prompt_tokens_kept", "Of these, tokens that an earlier request had computed", registry=own
        )
        self.answer_tokens = Counter("flexgen_answer_tokens", "New tokens of answers", registry=own)
        self.first_s = Histogram("flexgen_first_token_seconds", "From arrival", buckets=_SECONDS, registry=own)
        self.request_s = Histogram("flexgen_request_seconds", "From arrival", buckets=_SECONDS, registry=own)
        self.in_system = Gauge("flexgen_sequences", "Sequences that run or wait", registry=own)
        self.kv_slots = Gauge("flexgen_kv_slots_in_use", "KV slots that hold a sequence", registry=own)
        self.passes = Counter("flexgen_passes", "Passes through the model", registry=own)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
