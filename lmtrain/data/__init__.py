"""From text to batches: sources → tokenizer → prepared arrays → batches. Knows no model and no training."""
