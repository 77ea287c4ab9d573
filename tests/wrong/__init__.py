"""Wrong implementations, as someone would plausibly write them, and correct ones in other styles.

They test `beyond.conformance`: each wrong one must be diagnosed with the theorem beside it, and the
correct ones must pass.
"""
