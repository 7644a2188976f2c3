"""``cdistill init``: a recipe for one's own models and data, after a look at both."""
