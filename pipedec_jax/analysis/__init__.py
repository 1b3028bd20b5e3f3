"""What the numbers mean: modeled time, and the formulas of the papers."""
