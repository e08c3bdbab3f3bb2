"""The embedded default: the whole method, small, on pictures that any machine can get (docs/demo.md)."""
