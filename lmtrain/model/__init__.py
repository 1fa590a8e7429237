"""The transformer: its layers, initial weights, size formulas and text generation.

Knows nothing of training, data files or config groups other than the model's own.
"""
