"""The local page: every record of some results folders in one static folder that a browser opens from disk."""
