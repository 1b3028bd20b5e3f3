"""PipeSpec: a hierarchy of models, all running at once, each a program and a pipe of its own."""
