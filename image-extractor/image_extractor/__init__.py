"""Image data sets in HDF5 from sim_telarray files of the Cherenkov Telescope Array."""

__version__ = "1.0.0"
