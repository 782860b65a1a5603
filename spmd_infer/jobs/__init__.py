"""Offline jobs: rows of a file or folder through a task, on any number of processes, with nothing lost or doubled."""
