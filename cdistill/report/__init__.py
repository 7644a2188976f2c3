"""The page of runs: what they have logged, side by side.."""
