"""What `scripts/generate.py` does: its options, the decoder they ask for, running it, and what is printed."""
