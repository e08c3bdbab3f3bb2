"""Single metrics, one a file; the table of them is in `muse/evaluation/evaluator.py`."""
