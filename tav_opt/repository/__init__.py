"""The model repository on disk, which Triton is pointed at."""
