"""Studies: several recipes over several seeds, scored on the same sets, compared in one table."""
