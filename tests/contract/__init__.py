"""Tests that every registered strategy must pass."""
