"""Training: optimizers, schedules, precision, one step, evaluation, checkpoints, and the trainer that runs them.

Knows neither Hydra nor MLflow: what it measures goes to a callable it is given.
"""
