"""The program `flashdelta`. `main` is its entry point; the modules beside this one are its subcommands and what they share."""

from flashdelta.cli.app import main

__all__ = ["main"]
