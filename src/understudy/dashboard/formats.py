"""How figures, times and money are written on the pages. Times are UTC and say so.

It ignores where figures come from; nothing here escapes text, for the templates do.
"""

from __future__ import annotations

import datetime as dt
import math


def count(value: float) -> str:
    """1234567 -> 1,234,567."""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """Three digits and a unit: 1234567 -> 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.3g} {unit}" if abs(scaled) < 999.5 else f"{scaled:,.0f} {unit}"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def usd(value: float | None) -> str:
    """Cents for what is large, two digits that matter for what is small (what a million cost for what is
    tiny), a dash for what is unknown."""
    if value is None:
        return "–"
    if value == 0:
        return "$0"
    if abs(value) < 1e-5:
        return f"${value * 1e6:.2g} per M"
    if abs(value) >= 0.995:
        return f"${value:,.2f}"
    digits = min(2 - math.ceil(math.log10(abs(value))), 8)
    return f"${value:.{max(digits, 2)}f}"


def percent(share: float) -> str:
    """0.1234 -> 12.3%; what is not zero never reads as zero."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share * 100:.1f}%"


def evidence(value: float) -> str:
    """An e-value: below a hundredth and beyond a million nothing more is to be learnt from its digits."""
    if value < 0.01:
        return "<0.01"
    return f"{value:.3g}" if value < 1000 else count(value) if value < 1e6 else ">1,000,000"


def signed(points: float) -> str:
    """A difference of shares in points of a hundred: 0.0123 -> +1.2."""
    return f"{points * 100:+.1f}".replace("-", "−")


def seconds(value: float) -> str:
    """A duration."""
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.0f} min"


def moment(at: float) -> str:
    """Unix seconds -> 2026-03-01 12:34:56 UTC."""
    return f"{_time(at):%Y-%m-%d %H:%M:%S} UTC"


def iso(at: float) -> str:
    """Unix seconds for a ``datetime`` attribute."""
    return f"{_time(at):%Y-%m-%dT%H:%M:%SZ}"


def day(at: float) -> str:
    """Unix seconds -> 1 Mar 2026."""
    return calendar_day(_time(at).date())


def calendar_day(date: dt.date) -> str:
    """1 Mar 2026."""
    return f"{date.day} {date:%b %Y}"


def ago(at: float, now: float) -> str:
    """How long since, in the largest unit that fits."""
    passed = max(0.0, now - at)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if passed >= size:
            return f"{passed / size:.0f} {unit} ago"
    return f"{passed:.0f} s ago"


def _time(at: float) -> dt.datetime:
    # a record may carry any number as its time; years beyond these cannot be written
    return dt.datetime.fromtimestamp(min(max(at, 0.0), 253_402_300_799.0), dt.UTC)
