"""Benchmarks: what is measured, how, and the report."""
