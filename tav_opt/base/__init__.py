"""A base model before it is loaded: what its configurations say, its weights, and the hub it may come from."""
