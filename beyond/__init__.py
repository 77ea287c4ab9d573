"""What came after DPO. Nothing in the core imports it."""
