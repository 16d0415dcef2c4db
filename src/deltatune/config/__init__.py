"""Recipes: their schema, their rules, and how they are read. Imports no torch."""
