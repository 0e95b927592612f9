"""Measures the service against what it must be better than: ``python -m benchmarks``."""
