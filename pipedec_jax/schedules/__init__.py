"""Schedules: what a tick sends. See `base` for the interface."""
