"""What methods cost and need, known without running them: modeled ticks, closed forms, simulated hierarchies.

Decoders use it (to say what was gained, to choose exits, passes and models); `pipedec_jax.analysis` measures beside it.
"""
