"""From a prompt to streamed text: the public decoder over the pipeline engine."""
