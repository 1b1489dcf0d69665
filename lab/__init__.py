"""Runs recipes: many runs in a log folder, summaries, your own images, saved networks."""
