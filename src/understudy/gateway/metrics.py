"""What one gateway process counts, and its Prometheus text.

Every process of a port counts for itself (label ``pid``); it ignores what is in the store.

Source: Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate

from understudy.traffic.segments import SegmentWriter

_Labels = tuple[tuple[str, str], ...]


BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the histograms' buckets, in seconds: from a cached answer to a long chain of thought."""


class Histogram:
    """How often something took how long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds


class Metrics:
    """Counters of the data plane; plain attributes, because the hot path adds to them."""

    def __init__(self) -> None:
        self.requests: defaultdict[tuple[str, int], int] = defaultdict(int)
        """(route, status the client got) -> count."""
        self.attempts: defaultdict[tuple[str, str], int] = defaultdict(int)
        """(endpoint, status or "failed") -> count."""
        self.seconds: defaultdict[str, Histogram] = defaultdict(Histogram)
        """route -> seconds from complete request to end of answer."""
        self.first_byte: defaultdict[str, Histogram] = defaultdict(Histogram)
        """route -> seconds from complete request to the answer's first byte, where one came."""
        self.refused_by_limit: defaultdict[str, int] = defaultdict(int)
        """limit of a key -> calls refused because it was used up."""
        self.unpriced = 0
        self.spans: tuple[int, int] = (0, 0)
        """Sent, dropped; filled in when somebody looks."""
        self.connections_opened = 0
        self.connections_reused = 0
        self.bytes_relayed = 0
        self.route_faults = 0
        self.index_lag_bytes = 0
        """Of all processes' segments, what is not in the store yet; what grows here is not kept up with."""
        self.resting: dict[str, bool] = {}
        """Endpoint -> whether it is passed over for its failures; filled in when somebody looks."""

    def text(self, in_flight: int, clients: int, writer: SegmentWriter) -> bytes:
        """All metrics in the exposition format."""
        page = _Page()
        page.add("requests_total", "counter", "Answers by route and status.", self._requests())
        page.add("request_seconds", "histogram", "Time to the end of an answer.", ())
        page.histograms("request_seconds", self.seconds)
        page.add("first_byte_seconds", "histogram", "Time to the first byte of an answer.", ())
        page.histograms("first_byte_seconds", self.first_byte)
        page.add("attempts_total", "counter", "Tries at upstreams.", self._attempts())
        limits = (((("limit", name),), count) for name, count in self.refused_by_limit.items())
        page.add("refused_by_limit_total", "counter", "Calls refused by a limit of their key.", limits)
        page.one("unpriced_calls_under_a_money_limit_total", "counter", self.unpriced)
        page.one("spans_sent_total", "counter", self.spans[0])
        page.one("spans_dropped_total", "counter", self.spans[1])
        page.one("upstream_connections_opened_total", "counter", self.connections_opened)
        page.one("upstream_connections_reused_total", "counter", self.connections_reused)
        page.one("relayed_bytes_total", "counter", self.bytes_relayed)
        page.one("in_flight", "gauge", in_flight)
        page.one("client_connections", "gauge", clients)
        page.one("route_faults", "gauge", self.route_faults)
        page.one("index_lag_bytes", "gauge", self.index_lag_bytes)
        resting = (((("endpoint", name),), int(rests)) for name, rests in self.resting.items())
        page.add("upstream_resting", "gauge", "Upstreams passed over for their failures.", resting)
        counters = writer.counters
        page.one("records_total", "counter", counters.records)
        page.one("record_bytes_total", "counter", counters.bytes)
        page.one("records_dropped_total", "counter", counters.dropped)
        page.one("record_syncs_total", "counter", counters.syncs)
        page.one("record_sync_failures_total", "counter", counters.sync_failures)
        page.one("record_log_full", "gauge", int(writer.full))
        return page.encode()

    def _requests(self) -> Iterable[tuple[_Labels, float]]:
        for (route, status), count in self.requests.items():
            yield (("route", route), ("status", str(status))), count

    def _attempts(self) -> Iterable[tuple[_Labels, float]]:
        for (endpoint, outcome), count in self.attempts.items():
            yield (("endpoint", endpoint), ("outcome", outcome)), count


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []
        self._pid = str(os.getpid())

    def add(self, name: str, kind: str, text: str, samples: Iterable[tuple[_Labels, float]]) -> None:
        self._lines.append(f"# HELP understudy_{name} {text}")
        self._lines.append(f"# TYPE understudy_{name} {kind}")
        for labels, value in samples:
            pairs = ",".join(f'{key}="{_escape(label)}"' for key, label in (*labels, ("pid", self._pid)))
            self._lines.append(f"understudy_{name}{{{pairs}}} {value}")

    def histograms(self, name: str, timed: Mapping[str, Histogram]) -> None:
        """The samples of a histogram by route."""
        for route, histogram in timed.items():
            ours = f'route="{_escape(route)}",pid="{self._pid}"'
            for bound, count in zip((*BOUNDS_S, "+Inf"), accumulate(histogram.counts), strict=True):
                self._lines.append(f'understudy_{name}_bucket{{{ours},le="{bound}"}} {count}')
            self._lines.append(f"understudy_{name}_sum{{{ours}}} {round(histogram.total_s, 6)}")
            self._lines.append(f"understudy_{name}_count{{{ours}}} {sum(histogram.counts)}")

    def one(self, name: str, kind: str, value: float) -> None:
        self.add(name, kind, name.replace("_total", "").replace("_", " ").capitalize() + ".", [((), value)])

    def encode(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
