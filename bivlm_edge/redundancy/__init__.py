"""How many image tokens a model needs: controls, runs, statistics and pages. Needs no torch."""
