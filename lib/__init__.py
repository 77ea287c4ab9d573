"""How results are measured (evaluate.py), and what supports the experiment."""
