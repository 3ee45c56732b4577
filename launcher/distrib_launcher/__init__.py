"""The `distrib` command: turns a configuration into processes, watches them, explains what went wrong. No torch."""
