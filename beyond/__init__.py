"""What goes beyond the paper. It imports the core, which never imports it."""
