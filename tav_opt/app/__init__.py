"""A page in the browser over a running server, or over the same editor in this process: edits, tuning, clips."""
