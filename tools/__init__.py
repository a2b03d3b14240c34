"""Command line: the only place with files, terminals and argument parsing."""
