"""A model learns a subject from a few pictures of it: DreamBooth (Ruiz et al. 2022, arXiv 2208.12242)."""
