"""Choosing a mesh for a model and saying why."""
