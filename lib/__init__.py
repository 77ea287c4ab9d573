"""Support code that the paper does not discuss."""
