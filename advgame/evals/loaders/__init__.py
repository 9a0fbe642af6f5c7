"""Readers of the public evaluation sets' own files, one file a family; every row becomes an `EvalRow`."""
