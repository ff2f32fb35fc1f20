"""Many clips tuned, edited, measured and looked at: the paper's experiments, and any team's own (paper section 4)."""
