"""Benchmarks: python -m eval.bench engine, python -m eval.bench gpu."""
