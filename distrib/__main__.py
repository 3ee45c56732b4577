"""`python -m distrib`: the same as the command `distrib`."""

from distrib_launcher.cli import main

main()
