"""What happened in a run: the metrics file that decides, the mirrors that show it, pictures, the environment.

Nothing here knows the trainer, and importing this package imports neither torch nor mlflow.
"""
