"""`python -m distrib_launcher`."""

from distrib_launcher.cli import main

main()
