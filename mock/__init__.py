"""Simulated galaxies: their physics, and files in the form of the archive's (mock_manga.py)."""
