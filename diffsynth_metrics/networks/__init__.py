"""The networks that no library has in the checkpoint's own layout."""
