"""Recipes of other projects: read, turned into ours key by key, and every key accounted for. Imports no torch."""
