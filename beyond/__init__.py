"""What goes beyond the paper. It imports the core, which loads some of it by name."""
