"""Understudy: the replacement for a retiring model, found, proven, owned and moved to."""

__version__ = "0.1.0"
