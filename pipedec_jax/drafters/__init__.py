"""Drafters: who proposes the guesses. See `base` for the interface."""
