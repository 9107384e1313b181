"""Measurements: one question per file, each a table and a JSON file with machine, commit, config and correctness."""
