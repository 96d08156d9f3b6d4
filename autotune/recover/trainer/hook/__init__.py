"""A folder for PYTHONPATH: its `sitecustomize` is run by every interpreter that starts under it."""
