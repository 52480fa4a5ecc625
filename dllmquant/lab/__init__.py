"""Measuring models: evaluation, paired statistics, reports. It may import everything; only the CLI imports it."""
