"""The pipeline: stages on a mesh axis, one tick of it, and the engine that runs ticks."""
