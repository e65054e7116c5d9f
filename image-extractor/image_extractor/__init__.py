"""From sim_telarray files of the Cherenkov Telescope Array to image data sets in HDF5."""

__version__ = "1.0.0"
