"""Pictures of a recording: a timeline of ranks, the tree as it grows, and a trace for Perfetto."""
