"""Tools that make and measure the demo model; not needed to run the pack."""
