"""Everything that does not know what a network is. Importing it does nothing."""
