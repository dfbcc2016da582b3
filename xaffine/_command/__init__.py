"""The parts of the command ``xaffine``: one file for each subcommand, and what they share."""

__all__: list[str] = []
