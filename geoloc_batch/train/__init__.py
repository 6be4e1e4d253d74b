"""Training of heads on stored features: splits, losses, the loop, sweeps."""
