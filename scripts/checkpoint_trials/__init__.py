"""Making checkpoints to try the converter with: large ones, corrupted ones, and conversions that are killed."""
