"""One run on many processes: who they are, how they speak with each other, how a model is divided among them.

Knows neither data nor training: `training` is given a `Team`, and a run is taken part in by `lmtrain/taking_part.py`.
"""
