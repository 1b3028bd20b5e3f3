"""What happened in every tick of an answer, kept on request: `tape` on the devices, `history` on the host."""
