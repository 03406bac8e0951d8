"""The checks that `doctor` and `train` make before a run."""
