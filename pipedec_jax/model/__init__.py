"""LLaMA as pure functions, and the parameter tree they run over."""
