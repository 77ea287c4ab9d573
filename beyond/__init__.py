"""What goes beyond the paper. Files here import the core, which loads some of them by name."""
