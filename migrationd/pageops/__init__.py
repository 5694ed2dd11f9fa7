"""Hot loops over arrays of pages: NumPy only, no state."""
