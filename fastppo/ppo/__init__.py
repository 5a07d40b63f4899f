"""PPO: the configuration, a batch and its advantages, the step, and the trainer that drives it."""
