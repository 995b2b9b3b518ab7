"""One file per annotation format; each ends in the same records."""
