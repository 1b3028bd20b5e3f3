"""Other software that decodes the same weights: to compare with, never part of the runtime. Needs extra `peers`."""
