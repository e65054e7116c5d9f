"""Simulated MaNGA galaxies: physics, one galaxy, its files and their truth (mock_manga.py)."""
