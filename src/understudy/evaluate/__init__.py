"""Proof that a candidate is at least as good: replay, grade, sequential tests, benchmarks, certificate."""
