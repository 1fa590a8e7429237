"""Settings: their types and rules (`schema`), and how Hydra's composition becomes them (`compose`).

Importing this package imports neither torch nor Hydra.
"""
