"""Several runs: what Hydra calls around a multirun (`sweeper`) and how runs compare (`comparison`)."""
