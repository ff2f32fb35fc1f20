"""Starts the server, watches it, starts it anew."""
