"""Recipes: their schema, their rules, and how they are read. Imports no torch."""

from __future__ import annotations

from deltatune.errors import UserError

__all__ = ["UserError"]
