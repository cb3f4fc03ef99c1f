"""Shared by every program: parameters, errors, files, paths, cache keys."""
