"""The MLflow mirror: what is said to MLflow, and nowhere else. MLflow is imported at the first connection."""
