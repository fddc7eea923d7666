"""The whole command line: the app with every command registered, in the order in which `--help` lists them."""

from importlib import import_module

from kdistill.cli.app import app as app

for _name in ("plan", "run", "sweep", "models", "cache", "report", "catalog", "doctor"):
    import_module(f"kdistill.cli.{_name}")
