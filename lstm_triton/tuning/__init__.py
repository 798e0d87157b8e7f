"""Tuned tables: what they hold (table), where they come from (store), how they are made (search)."""
