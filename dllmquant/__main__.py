"""Runs the command line interface: `python -m dllmquant`."""

from dllmquant.cli import main

if __name__ == "__main__":
    main()
