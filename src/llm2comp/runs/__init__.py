"""What a run directory is: its names, its recipe, which stages are done, the encoder of each."""
