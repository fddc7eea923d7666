"""The command line: arguments, messages and exit status only.

`app` has what the commands share, each other module its commands. Everything else is done by `runs` and the rooms.
"""


def main() -> None:
    """The entry point of the `kdistill` command."""
    from kdistill.cli.commands import app

    app()
