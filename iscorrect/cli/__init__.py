"""The command line; nothing imports it.

Each command is a file with ``HELP``, ``add_arguments(parser)`` and ``run(options)``, which returns
the exit code. What a command prints goes through ``terminal``.
"""
