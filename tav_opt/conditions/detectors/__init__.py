"""What maps are made of a video by: each kind in a file of its own, its libraries optional."""
