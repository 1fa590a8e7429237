"""Train transformer language models from scratch, and find by sweeps which settings are best."""
