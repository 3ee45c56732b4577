"""The commands, one file each; `distrib_launcher.cli` imports one when it is called."""
