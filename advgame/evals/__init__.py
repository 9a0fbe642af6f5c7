"""Evaluation: suites, generation, classifiers, metrics with their conventions, and the audit of judges."""
