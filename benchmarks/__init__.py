"""Benchmarks behind the claims: one module for each, results in benchmarks/results."""
