"""Tests of XLA on PJRT's CPU client, in the virtual environment that `make test-tpu` makes."""
