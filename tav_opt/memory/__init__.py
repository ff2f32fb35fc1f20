"""What is free, what work needs, and what has been promised of it."""
