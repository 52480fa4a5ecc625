"""The version of dllmquant."""

__version__ = "0.1.0"
